"""SiD: a diffusion model distilled into a one-step generator by score identities, without data.

Read in this order: ``losses.py`` (the paper's two losses), ``objectives.py`` (Algorithm 1, from noise to what each
network is trained on), ``module.py`` (the updates in turn, the running mean, checkpoints); ``denoiser.py`` says how any
teacher becomes the f of the formulas.
"""

from lightning_plugins.sid.denoiser import Denoiser
from lightning_plugins.sid.diffusion_teacher import DiffusionTeacher
from lightning_plugins.sid.guidance import guided
from lightning_plugins.sid.losses import fake_score_loss, fisher_divergence, generator_loss
from lightning_plugins.sid.module import SiD
from lightning_plugins.sid.noise_levels import karras_sigmas
from lightning_plugins.sid.sampling import many_steps
from lightning_plugins.sid.teacher import Teacher, load_teacher

__all__ = [
    "Denoiser",
    "DiffusionTeacher",
    "SiD",
    "Teacher",
    "fake_score_loss",
    "fisher_divergence",
    "generator_loss",
    "guided",
    "karras_sigmas",
    "load_teacher",
    "many_steps",
]
