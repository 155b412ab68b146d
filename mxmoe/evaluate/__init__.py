"""How good a model is: perplexity, and the small trained model that ships with the package."""

from mxmoe.evaluate.perplexity import Perplexity, perplexity
from mxmoe.evaluate.tiny import TinyMoe, load_tiny

__all__ = ["Perplexity", "TinyMoe", "load_tiny", "perplexity"]
