"""A row in Flower's simulation: Message API, FedAvg, Ray's backend. A client has a core to itself, its default."""

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from workload import arguments, hand_in, numpy_model, shapes

ARGS = arguments(__doc__).parse_args()
KIND, CLIENTS = ARGS.kind, ARGS.clients
client_app, server_app = ClientApp(), ServerApp()


@client_app.train()
def train(message, context):
    import digitsnet
    from workload import note, update, weight

    number = message.content["config"]["server-round"] - 1
    client = context.node_config["partition-id"] + 1
    note("task", round=number, client=client)
    received, steps = message.content["arrays"], weight(client)
    if KIND == "np":
        arrays = dict(enumerate(received.to_numpy_ndarrays()))
        answer = ArrayRecord(list(update(arrays, client).values()))
    else:
        import torch  # before the conversion, which looks whether it is there

        torch.set_num_threads(1)
        tensors = received.to_torch_state_dict()
        if KIND == "big":
            answer = ArrayRecord(update(tensors, client))
        else:
            net = digitsnet.network()
            net.load_state_dict(tensors)
            steps = digitsnet.train(net, digitsnet.load(CLIENTS)[0][client - 1], number, client - 1)
            answer = ArrayRecord(net.state_dict())
    content = {"arrays": answer, "metrics": MetricRecord({"num-examples": steps})}
    return Message(content=RecordDict(content), reply_to=message)


def initial():
    if KIND == "np":
        return ArrayRecord(list(numpy_model("np", 0, 0).values()))
    if KIND == "big":
        import torch

        return ArrayRecord({name: torch.zeros(shape) for name, shape in shapes(ARGS.mib, ARGS.tensors).items()})
    import digitsnet

    return ArrayRecord(digitsnet.network().state_dict())


@server_app.main()
def serve(grid, context):
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    result = strategy.start(grid=grid, initial_arrays=initial(), num_rounds=ARGS.rounds)
    hand_in(KIND, {name: array.numpy() for name, array in result.arrays.items()})


if __name__ == "__main__":
    backend = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"include_dashboard": False},
    }
    run_simulation(server_app, client_app, num_supernodes=CLIENTS, backend_config=backend)
