"""influence_fast: which training samples help or harm a language model.

Implements Vitel & Chhabra, "First is Not Really Better Than Last" (arXiv 2511.04715): per-layer influence from
per-sample gradients, aggregated over layers by mean, rank and vote, judged by the Noise Detection Rate.

Names are loaded on first use, so ``import influence_fast`` costs nothing: not even torch is imported. The stub beside this
file, ``__init__.pyi``, lists them with the modules they live in.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
__version__ = "0.1.0"
