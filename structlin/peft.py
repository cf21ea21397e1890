"""The plug-in for peft: importing it makes LoRA, DoRA and IA3 of peft know structured layers."""

from structlin.integrations.peft import StructuredIA3Linear, StructuredLoraLinear

__all__ = ["StructuredIA3Linear", "StructuredLoraLinear"]
