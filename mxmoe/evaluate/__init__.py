"""How good a model is: perplexity, the distance from another model, and the small trained model that ships."""

from mxmoe.evaluate.compare import Comparison, compare
from mxmoe.evaluate.perplexity import Perplexity, perplexity
from mxmoe.evaluate.remembered import Remembered, remember
from mxmoe.evaluate.tiny import TinyMoe, load_tiny

__all__ = ["Comparison", "Perplexity", "Remembered", "TinyMoe", "compare", "load_tiny", "perplexity", "remember"]
