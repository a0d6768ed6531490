"""A plan as frozen data: shapes, routes, exchanges of heads, stages."""
