"""The epsilon is a buffer."""

import torch
from model import Model, join, plain, tokens

join()
with torch.no_grad():
    torch.compile(Model(plain, epsilon=torch.tensor(1e-6)))(tokens())
