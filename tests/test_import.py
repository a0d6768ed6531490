"""`import ringattn` must be cheap and possible without any optional package."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOOK = "import sys, ringattn; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def loaded(statement: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_works_without_the_optional_packages() -> None:
    block = (
        "import sys; sys.modules.update(dict.fromkeys(['flash_attn', 'transformers', 'deepspeed', 'hydra', 'tqdm']));"
    )
    assert "ringattn" in loaded(block + LOOK)


def test_import_joins_no_process_group_and_touches_no_device() -> None:
    statement = "import torch, ringattn, torch.distributed as d; print(d.is_initialized(), torch.cuda.is_initialized())"
    assert loaded(statement) == {"False"}


def test_import_loads_no_optional_package() -> None:
    """Whatever torch itself loads is not ours to forbid (a CUDA build may load triton)."""
    statement = LOOK.replace("import sys, ringattn;", "import sys, ringattn.kernels.registry;")
    ours = loaded(statement) - loaded(statement.replace("ringattn.kernels.registry", "torch"))
    assert "ringattn" in ours
    forbidden = {"flash_attn", "flash_attn_interface", "transformers", "deepspeed", "hydra", "omegaconf", "triton"}
    assert not ours & (forbidden | {"matplotlib", "tensorboard", "tqdm", "xformers", "torch_npu"})
