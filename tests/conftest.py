import torch

torch.set_num_threads(1)  # tiny models lose more to waiting threads than they gain
