import warnings, torch, logging
from ringattn.hf.conformance import FORMS, alone, together, differences
from ringattn.hf.model import parallelize
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.parallel.ranks import mesh_of
from tests.hf.families import GQA
from tests.hf.tuners import *
def config_of(case):
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    kind=case.partition(":")[0]
    opts=dict(CASES[case])
    tm=opts.pop("target_modules",LINEAR)
    if tm is not None: opts["target_modules"]=tm
    if "use_bdlora" in opts: opts["use_bdlora"]=peft.tuners.lora.config.BdLoraConfig(**opts["use_bdlora"])
    if "kasa" in case: opts["kasa_config"]=peft.tuners.lora.config.KasaConfig()
    if "velora" in case: opts["velora_config"]=peft.tuners.lora.config.VeloraConfig(num_groups=4, init_type="random")
    return PEFT_TYPE_TO_CONFIG_MAPPING[getattr(peft.PeftType,kind)](task_type="CAUSAL_LM",**opts)
def one(case):
    warnings.filterwarnings("ignore")
    from peft import get_peft_model
    fam="qwen3_moe" if "target_parameters" in case else "llama" if "replication" in case or "ADAPTION" in case else "qwen3"
    torch.manual_seed(0)
    m=get_peft_model(tiny_model(tiny_config(read_config(fam),**({} if "moe" in fam else GQA))), config_of(case))
    torch.manual_seed(1)
    for n,p in m.named_parameters():
        if p.requires_grad: p.data.add_(torch.randn_like(p)*0.05)
    m.train()
    if case.startswith("PVERA"): m.eval()
    truth=alone(m,FORMS[4])
    m.zero_grad()
    h=parallelize(m,mesh_of(2,1))
    d=differences(together(m,mesh_of(2,1),FORMS[4],"zigzag"),truth)
    n=len(truth.gradients); g=sum(float(x.norm()) for x in truth.gradients.values())
    return ("OK" if d.within(1e-5) else "WRONG", f"{d.logits:.1e} {d.loss:.1e} {d.gradients:.1e} {d.worst} n={n} g={g:.2g} min={min(float(x.norm()) for x in truth.gradients.values()):.1e}")
