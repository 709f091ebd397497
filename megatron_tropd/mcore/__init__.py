"""The only room that imports megatron.core. Importing it prepares the platform (see there)."""

from megatron_tropd.mcore.platform import prepare_platform

prepare_platform()
