"""The synthesized Inception, and a cheap network in its place."""

from tests.inception import cheap, inception  # noqa: F401
