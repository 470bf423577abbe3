"""Calibration of D²Quant, one decoder layer at a time."""
