"""Everything fuses."""

import torch
from model import Model, join, plain, tokens

join()
with torch.no_grad():
    torch.compile(Model(plain))(tokens())
print("the script's own line")
