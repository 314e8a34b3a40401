"""The Trainer's side of the strategy: ``mixin.py`` follows the life of a fit, the others serve it, one idea a file."""
