"""Who sends what to whom, stage by stage: gather, joint, ring."""
