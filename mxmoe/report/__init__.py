"""Tables and pictures of results, from plain values: no torch, no model, no IR."""

from mxmoe.report.figure import save_figure
from mxmoe.report.picture import BitMap, Point, draw_bit_map, draw_frontier, draw_loss_curve, draw_overview
from mxmoe.report.table import Cell, Column, csv_table, text_table

__all__ = [
    "BitMap",
    "Cell",
    "Column",
    "Point",
    "csv_table",
    "draw_bit_map",
    "draw_frontier",
    "draw_loss_curve",
    "draw_overview",
    "save_figure",
    "text_table",
]
