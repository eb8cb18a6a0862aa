"""`--compat nvflare`: scripts written for NVFLARE import fedloom; each check in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fedloom.executor import compat
from fedloom.executor.compat import names
from fedloom.executor.compat.finder import GUIDE, missing, resolve

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, path: Path | None = compat.SHIMS, code_wanted: int = 0) -> subprocess.CompletedProcess[str]:
    """Run code with this folder on the path, as the processes of a run have it."""
    env = {**os.environ, "PYTHONPATH": str(path or "")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == code_wanted, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.parametrize("module", sorted(names.MODULES))
def test_every_name_of_the_table_is_there(module: str) -> None:
    for home in names.MODULES[module].values():
        assert resolve(home) is not None


def test_the_client_api_is_whole() -> None:
    """What `fedloom.client` offers is offered under NVFLARE's name too."""
    import fedloom.client

    own = {"ClientError", "state"} | set(names.MODULES["nvflare.client.tracking"])
    assert set(fedloom.client.__all__) - own <= set(names.MODULES["nvflare.client"])


def test_names_are_fedlooms_own() -> None:
    python(
        "import nvflare.client as flare, fedloom.client\n"
        "from nvflare.app_common.abstract.fl_model import FLModel, ParamsType\n"
        "from nvflare.app_common.np.constants import NPConstants\n"
        "from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe\n"
        "from nvflare.app_common.np.recipes import NumpyFedAvgRecipe as Again\n"
        "from nvflare.recipe import SimEnv\n"
        "import fedloom.recipe\n"
        "assert FLModel is fedloom.client.FLModel is flare.FLModel and flare.ParamsType is ParamsType\n"
        "assert flare.is_running is fedloom.client.is_running\n"
        "assert NPConstants.NUMPY_KEY == 'numpy_key'\n"
        "assert NumpyFedAvgRecipe is Again is fedloom.recipe.NumpyFedAvgRecipe and SimEnv is fedloom.recipe.SimEnv\n"
        "assert 'is_running' in flare.__all__ and not hasattr(flare, 'load') and not hasattr(flare, '__wrapped__')\n"
    )


def test_nothing_is_loaded_before_it_is_used() -> None:
    python(
        "import sys, nvflare.recipe, nvflare.client.tracking, nvflare.app_opt.pt.recipes.fedavg\n"
        "loaded = [name for name in ('fedloom.recipe', 'fedloom.client', 'numpy', 'torch') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )


@pytest.mark.parametrize(
    ("line", "name", "near"),
    [
        ("from nvflare.client import load", "nvflare.client.load", "fedloom.client"),
        ("import nvflare.client.ipc", "nvflare.client.ipc", "fedloom.client"),
        ("from nvflare.apis.executor import Executor", "nvflare.apis.executor", "docs/guides/jobs.md"),
        ("from nvflare.app_opt.xgboost.recipes import X", "nvflare.app_opt.xgboost", "federated averaging"),
        ("from nvflare import Whatever", "nvflare.Whatever", "nvflare.recipe"),
    ],
)
def test_a_name_without_an_equivalent_says_so(line: str, name: str, near: str) -> None:
    error = python(line, code_wanted=1).stderr.strip().splitlines()[-1]
    assert error.startswith(f"ImportError: fedloom has no equivalent of {name} ")
    assert near in error
    assert GUIDE in error
    python(f"try:\n    {line}\nexcept ImportError:\n    pass")


def test_hints_name_the_longest_prefix_first() -> None:
    for number, (prefix, _) in enumerate(names.NEAREST):
        assert not any((prefix + ".").startswith(earlier + ".") for earlier, _ in names.NEAREST[:number])
    assert "TensorFlow" in missing("nvflare.app_opt.tf.recipes.fedavg")
    assert names.OTHERWISE in missing("nvflare.tool")


def test_what_is_only_imported_does_no_harm_until_it_is_used() -> None:
    python(
        "from nvflare.recipe import PocEnv, ProdEnv, SimEnv\n"
        "from nvflare.app_opt.pt.recipes.fedprox import FedProxRecipe\n"
        "from nvflare import FedJob\n"
        "assert not isinstance(1, PocEnv)\n"
        "from fedloom.serialization.errors import JobError\n"
        "def refused(use, word):\n"
        "    try:\n"
        "        use()\n"
        "    except JobError as error:\n"
        f"        assert word in str(error) and {GUIDE!r} in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(use)\n"
        "refused(lambda: PocEnv(num_clients=2), 'nvflare.recipe.PocEnv')\n"
        "refused(lambda: ProdEnv(startup_kit_location='x'), 'tcp://broker:7600')\n"
        "refused(lambda: FedProxRecipe(fedprox_mu=0.1), 'FedAvgRecipe')\n"
        "refused(lambda: type('Mine', (FedJob,), {}), 'fedloom.recipe.Job')\n"
    )


def test_an_aggregator_of_ones_own_has_its_base() -> None:
    python(
        "from nvflare.app_common.aggregators.model_aggregator import ModelAggregator\n"
        "class Mine(ModelAggregator):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.info('made')\n"
        "    def accept_model(self, model): pass\n"
        "    def aggregate_model(self): pass\n"
        "    def reset_stats(self): pass\n"
        "Mine().warning('used')\n"
        "try:\n"
        "    ModelAggregator()\n"
        "except TypeError:\n"
        "    pass\n"
        "else:\n"
        "    raise AssertionError\n"
    )


class TestEnable:
    """The switch itself."""

    SWITCH = "from fedloom.executor.compat import enable\nnote = enable('nvflare')\n"

    def test_this_process_and_its_children(self) -> None:
        code = self.SWITCH + (
            "assert note == '', note\n"
            "import os, subprocess, sys, nvflare.client\n"
            "assert enable('nvflare') == ''  # again\n"
            "subprocess.run([sys.executable, '-P', '-c', 'import nvflare.client as f; f.FLModel'], check=True)\n"
            "print(os.environ['PYTHONPATH'])\n"
        )
        theirs = ROOT / "examples"
        assert python(code, theirs).stdout.strip() == f"{compat.SHIMS}{os.pathsep}{theirs}"

    def test_an_installed_one_is_hidden_and_that_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "nvflare").mkdir()
        (tmp_path / "nvflare" / "__init__.py").write_text("raise RuntimeError('the installed one')\n")
        info = tmp_path / "nvflare-2.8.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvflare\nVersion: 2.8.1\n")
        code = self.SWITCH + (
            "import json, subprocess, sys, nvflare.client\n"
            "subprocess.run([sys.executable, '-c', 'import nvflare.client'], check=True)\n"
            "print(json.dumps(note))\n"
        )
        said = json.loads(python(code, tmp_path).stdout)
        assert said.startswith("nvflare 2.8.1 is installed here and is hidden")
        python("import nvflare", tmp_path, code_wanted=1)

    def test_too_late_once_the_installed_one_is_loaded(self, tmp_path: Path) -> None:
        (tmp_path / "nvflare.py").write_text("")
        done = python("import nvflare\n" + self.SWITCH, tmp_path, code_wanted=1)
        assert f"is loaded in this process already, from {tmp_path}" in done.stderr

    def test_a_name_that_is_not_known(self) -> None:
        from fedloom.serialization.errors import JobError

        with pytest.raises(JobError, match="--compat 'flower'; allowed is nvflare"):
            compat.enable("flower")
