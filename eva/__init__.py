"""eva: train small image classifiers, tracked batch by batch."""

__version__ = "0.1.0"
