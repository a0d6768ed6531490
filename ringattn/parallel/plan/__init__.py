"""A plan as frozen data: shapes, routes, exchanges of heads, stages."""

from ringattn.parallel.plan.exchange import Exchange, HeadShare
from ringattn.parallel.plan.plan import AttentionPlan, PartedPlan, Stage
from ringattn.parallel.plan.route import Message, Route
from ringattn.parallel.plan.shape import Shape

__all__ = ["AttentionPlan", "Exchange", "HeadShare", "Message", "PartedPlan", "Route", "Shape", "Stage"]
