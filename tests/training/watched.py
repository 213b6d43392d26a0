"""The program, which prints at its end which names of other packages it has replaced."""

from __future__ import annotations

import inspect
import sys
import warnings
from types import ModuleType
from typing import Any

PACKAGES = ("megatron.", "torch.", "multiprocessing")


def names() -> dict[str, Any]:
    """What stands under every name of the packages' modules and of their own classes."""
    found: dict[str, Any] = {}
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith(PACKAGES) or not isinstance(module, ModuleType):
            continue
        for name, value in vars(module).copy().items():
            found[f"{module_name}.{name}"] = value
            if inspect.isclass(value) and value.__module__ == module_name:
                for member, inner in vars(value).copy().items():
                    found[f"{module_name}.{value.__qualname__}.{member}"] = inner
    return found


def replaceable(value: Any) -> bool:
    """Whether a name holds code: Megatron itself changes its settings and caches."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    return inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value)


def main() -> None:
    # torch warns of old names that are looked at.
    warnings.simplefilter("ignore")
    from megatron_rw.platform import select_device

    select_device(["--device", "cpu"])
    # All that a run imports, before it replaces anything.
    import torch.distributed.checkpoint.filesystem  # noqa: F401

    import megatron_rw.scoring.job
    import megatron_rw.training.job  # noqa: F401
    import pretrain_gpt_rw

    before = names()
    try:
        pretrain_gpt_rw.main()
    finally:
        after = names()
        for name, value in before.items():
            if replaceable(value) and after.get(name) is not value:
                print(f"replaced {name}", flush=True)
