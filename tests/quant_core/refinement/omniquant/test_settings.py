"""Modes and their defaults."""

from __future__ import annotations

from dataclasses import replace

from bitmill.config.methods import OmniQuant
from bitmill.refinement.omniquant.settings import LearningSettings


def test_a_job_overrides_the_defaults_of_its_mode_only_where_it_says_so() -> None:
    plain = LearningSettings.of_spec(OmniQuant(mode="clipping"))
    assert plain == LearningSettings.of_mode("clipping")
    changed = LearningSettings.of_spec(OmniQuant(mode="clipping", epochs=3, augmented_loss=True))
    assert changed == replace(plain, epochs=3, augmented_loss=True)


def test_clipping_keeps_the_published_defaults() -> None:
    chosen = LearningSettings.of_mode("clipping")
    assert (chosen.epochs, chosen.batch, chosen.clipping_rate) == (20, 1, 1e-2)
    assert chosen.block_error == "plain"
    assert not chosen.cosine
    assert chosen.descent(128).steps == 20 * 128
