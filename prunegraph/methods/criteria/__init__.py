"""How much each prunable unit matters: a file a family, a decorated function a criterion."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")  # each adds its criteria to the registry
