import warnings
from ringattn.hf.conformance import FORMS, alone, together, differences
from ringattn.hf.model import parallelize
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.parallel.ranks import mesh_of
EXTRA={"hunyuan_v1_dense":{"head_dim":16},"hunyuan_v1_moe":{"head_dim":16},"ministral":{"head_dim":16},"nemotron":{"num_key_value_heads":2}}
def one(f):
    warnings.filterwarnings("ignore")
    c=tiny_config(read_config(f), **EXTRA.get(f,{}))
    m=tiny_model(c)
    m.train()
    out=[]
    try:
        truth=alone(m,FORMS[5])
    except Exception as e:
        return "ALONE FAILS "+repr(e)[:200]
    m.zero_grad()
    h=parallelize(m,mesh_of(2,1))
    try:
        d=differences(together(m,mesh_of(2,1),FORMS[5],"zigzag"),truth)
        return (type(m).__name__, "OK" if d.within(1e-5) else "WRONG", f"{d.logits:.1e} {d.loss:.1e} {d.gradients:.1e} {d.worst}")
    finally: h.undo()
