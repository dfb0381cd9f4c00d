"""Figures. This wing draws the arrays and tidy tables that it is handed, and computes nothing that a table could need."""
