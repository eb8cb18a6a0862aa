"""A row in pfl-research: one process, no messages. SGD of rate 1 on the mean difference is federated averaging."""

import itertools

import digitsnet
import numpy as np
import torch
from nets import Digits, Large
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.internal.ops.selector import set_framework_module
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn
from workload import TINY, arguments, hand_in, note, part, weight

NEVER = 10**6


class Tiny(nn.Module):
    """1,000 values."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(TINY))


def with_pfl_methods(net):
    """What it asks of a module beyond torch's; the algorithm below never calls them."""
    net.loss = lambda *batch, eval=False: torch.zeros(())
    net.metrics = lambda *batch, eval=False: {}
    return net


class OneClient(FederatedAveraging):
    """Federated averaging with the row's own work at a client."""

    def __init__(self, kind, parts):
        super().__init__()
        self.kind, self.parts = kind, parts
        self.noted = -1

    def train_one_user(self, initial_model_state, model, user_dataset, central_context):
        number = central_context.current_central_iteration
        client = int(user_dataset.user_id)
        if number != self.noted:
            self.noted = number
            note("task", round=number, client=client)
        if self.kind == "digits":
            digitsnet.train(model.pytorch_model, self.parts[client - 1], number, client - 1)
        else:
            with torch.no_grad():
                for parameter in model.pytorch_model.parameters():
                    parameter.add_(0.01 * part(client))
        return model.get_model_difference(initial_model_state), Metrics()


def main():
    args = arguments(__doc__).parse_args()
    set_framework_module(pytorch_ops)
    torch.set_num_threads(1 if args.kind == "digits" else 2)
    parts = digitsnet.load(args.clients)[0] if args.kind == "digits" else []
    made = {"np": Tiny, "big": lambda: Large(args.mib, args.tensors), "digits": Digits}
    net = with_pfl_methods(made[args.kind]())

    def user(number):
        data = parts[number - 1] if parts else (np.zeros(weight(number), np.uint8),) * 2
        return Dataset(raw_data=list(data), user_id=str(number))

    turns = itertools.cycle(range(1, args.clients + 1))
    users = FederatedDataset(user, lambda: next(turns))
    backend = SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByDatapoints()])
    model = PyTorchModel(
        model=net, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(net.parameters(), 1.0)
    )
    OneClient(args.kind, parts).run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=args.rounds,
            evaluation_frequency=NEVER,
            train_cohort_size=args.clients,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(local_learning_rate=0.1, local_num_epochs=1, local_batch_size=32),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[],
    )
    hand_in(args.kind, {name: value.detach().numpy() for name, value in net.state_dict().items()})


if __name__ == "__main__":
    main()
