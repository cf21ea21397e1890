"""The plug-in for vLLM, which finds it by its entry point once structlin is installed: nothing is to be imported."""

from structlin.integrations.vllm import StructuredMethod, VllmConfig, register

__all__ = ["StructuredMethod", "VllmConfig", "register"]
