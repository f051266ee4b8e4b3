"""The rows of `nn::bench::table()` in torch on two threads: milliseconds, the fastest of several calls."""

import time

import torch
import torch.nn.functional as F

torch.set_num_threads(2)
torch.manual_seed(0)


def best(name, times, body):
    body()
    fastest = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        body()
        fastest = min(fastest, time.perf_counter() - start)
    print(f"{fastest * 1e3:9.2f} ms  {name}", flush=True)


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.proj = torch.nn.Linear(width, width)
        self.norm2 = torch.nn.LayerNorm(width)
        self.fc1 = torch.nn.Linear(width, 4 * width)
        self.fc2 = torch.nn.Linear(4 * width, width)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, c // 64, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


pixels, kernel = torch.randn(4, 128, 32, 32), torch.randn(128, 128, 3, 3)
best("conv 3x3 4x128x32x32", 20, lambda: F.conv2d(pixels, kernel, padding=1))
pixels.requires_grad_(), kernel.requires_grad_()


def step(loss, parameters):
    for parameter in parameters:
        parameter.grad = None
    loss.backward()


best(
    "conv 3x3 4x128x32x32, forward and backward",
    20,
    lambda: step(F.conv2d(pixels, kernel, padding=1).sum(), [pixels, kernel]),
)
values = torch.randn(2048, 1024)
best("gelu 2M", 50, lambda: F.gelu(values, approximate="tanh"))
best("softmax 2048x1024", 50, lambda: F.softmax(values, -1))
left, right = torch.randn(2048, 1280), torch.randn(1280, 1280)
best("matmul 2048x1280x1280", 20, lambda: F.linear(left, right))
for width, layers, b, n in [(256, 4, 8, 96), (768, 4, 1, 376), (192, 6, 16, 88)]:
    model = torch.nn.Sequential(*[Block(width) for _ in range(layers)])
    x = torch.randn(b, n, width)
    parameters = list(model.parameters())
    best(
        f"transformer step {width} wide, {layers} layers, {b}x{n} tokens",
        15,
        lambda: step(model(x).square().mean(), parameters),
    )
