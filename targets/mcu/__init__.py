"""Microcontrollers: a model as plain C with one kernel header, inside stated flash and SRAM."""
