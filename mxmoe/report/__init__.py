"""Tables and pictures of results: no torch, no model."""

from mxmoe.report.bit_map import bit_map, module_bits, plan_bits, short_names, usage
from mxmoe.report.figure import save_figure
from mxmoe.report.gantt import Timeline, draw_timelines
from mxmoe.report.picture import BitMap, Point, draw_bit_map, draw_frontier, draw_loss_curve, draw_overview
from mxmoe.report.table import Cell, Column, csv_table, text_table

__all__ = [
    "BitMap",
    "Cell",
    "Column",
    "Point",
    "Timeline",
    "bit_map",
    "csv_table",
    "draw_bit_map",
    "draw_frontier",
    "draw_loss_curve",
    "draw_overview",
    "draw_timelines",
    "module_bits",
    "plan_bits",
    "save_figure",
    "short_names",
    "text_table",
    "usage",
]
