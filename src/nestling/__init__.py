"""Nestling trains one weight-sharing supernet, searches it on your device and exports what it measured.

A family is one function `build(arch) -> nn.Module` that makes a plain network. The supernet holds the weights
of the largest one and lends them, cut to shape, to every smaller one. `nestling.cli` is the command line;
`nestling.pipeline` shows every stage in order.
"""

__version__ = "0.1.0"
