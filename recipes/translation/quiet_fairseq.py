"""Imports fairseq once: with a clear error where it is missing, and without what the import does to others.

Some of fairseq's modules call ``logging.basicConfig``, even at DEBUG; every library of the process would then write all
that it has to say. And fairseq stores its own configurations with Hydra under names such as ``optimizer/adam``, against
which Hydra would from then on, in the second run of a sweep, validate files of the same names in ``conf/``.
"""

import copy
import logging
import sys
import warnings

from hydra.core.config_store import ConfigStore

for _name in ("fairseq", "fairseq_cli"):
    logging.getLogger(_name).setLevel(logging.WARNING)

_root = logging.getLogger()
_handlers, _level = list(_root.handlers), _root.level
_store = ConfigStore.instance()
_stored = copy.deepcopy(_store.repo)
try:
    with warnings.catch_warnings():  # deprecated calls of fairseq's own, of which who translates can do nothing
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        import fairseq
        import fairseq_cli.preprocess
        import sacrebleu
        import sacremoses
        import subword_nmt
except ImportError as error:
    raise ImportError(
        f"Translation needs fairseq, sacrebleu, sacremoses and subword-nmt, but {error.name!r} cannot be imported. "
        "Install them with: pip install 'lightning-slowmo[translation]'"
    ) from error
finally:
    _root.handlers[:] = _handlers
    _root.setLevel(_level)
    _store.repo = _stored

__all__ = ["fairseq", "fairseq_cli", "sacrebleu", "sacremoses", "subword_nmt"]
