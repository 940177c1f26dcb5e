"""Masked losses between predictions and targets: pure functions, in float32 whatever comes in.

Shapes are [b, h, w, c]; a mask may have one channel for all. Each loss is one mean over the masked
elements of the whole batch, as in GenPercept (arXiv 2403.06090), except where its docstring says
otherwise. An empty mask gives 0 with zero gradients. What the mask leaves out, in predictions and
targets, may be anything, NaN included: it reaches neither value nor gradient.

Losses that draw random numbers take one key per example (`diffusion.noise.per_example` derives such
keys from an example's index), so that a value does not depend on how a batch is split over devices.
"""

from jaxpercept.losses.alignment import Line, fit_line, scale_and_shift
from jaxpercept.losses.depth import gradient, ssi, ssi_median
from jaxpercept.losses.heat_maps import location
from jaxpercept.losses.hierarchical import hdn_random, hdsn_random
from jaxpercept.losses.masked import cells, l1, mse, pool_mask
from jaxpercept.losses.masks import bce, cross_entropy, soft_iou
from jaxpercept.losses.normals import angular, angular_kappa
from jaxpercept.losses.virtual_normals import vnl

__all__ = [
    "Line",
    "angular",
    "angular_kappa",
    "bce",
    "cells",
    "cross_entropy",
    "fit_line",
    "gradient",
    "hdn_random",
    "hdsn_random",
    "l1",
    "location",
    "mse",
    "pool_mask",
    "scale_and_shift",
    "soft_iou",
    "ssi",
    "ssi_median",
    "vnl",
]
