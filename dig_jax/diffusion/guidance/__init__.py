"""Guidance of a denoiser by a weaker one: rules as pure functions of both outputs."""

from dig_jax.diffusion.guidance.classifier_free import LabeledDenoiser, classifier_free, null_pair
from dig_jax.diffusion.guidance.guidance import GUIDED, PLAIN, ZERO, Guidance
from dig_jax.diffusion.guidance.rules import (
    APG,
    RULES,
    Autoguidance,
    CFGZero,
    ClassifierFree,
    Perturbed,
    Rule,
    make_rule,
)

__all__ = [
    "APG",
    "GUIDED",
    "PLAIN",
    "RULES",
    "ZERO",
    "Autoguidance",
    "CFGZero",
    "ClassifierFree",
    "Guidance",
    "LabeledDenoiser",
    "Perturbed",
    "Rule",
    "classifier_free",
    "make_rule",
    "null_pair",
]
