"""A plain module, and nobody said that no gradient is wanted."""

import torch
from model import Model, join, plain, tokens

join()
torch.compile(Model(plain))(tokens())
