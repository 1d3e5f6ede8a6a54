"""What examples/region_features.py is made of, each to be copied by itself.

boxes: which regions of which images, and how they are cut into batches and parts
images: pictures of any kind as RGB, and batches of them as a tensor
backbones: any model of torchvision as a module that gives feature maps, with their strides
files: parts that are whole or not there, and merged into one file
"""


class BadInputError(Exception):
    """The arguments, or the files they name, cannot be used; every process finds the same."""
