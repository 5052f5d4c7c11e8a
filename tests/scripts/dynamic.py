"""``dynamic=True`` makes a graph input of the epsilon."""

import torch
from model import Model, join, plain, tokens

join()
with torch.no_grad():
    torch.compile(Model(plain), dynamic=True)(tokens())
