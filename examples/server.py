"""A server that draws with one wrapped UNet: many requests at a time, in a pool of threads, some as streams.

pip install fastapi uvicorn
uvicorn --app-dir examples --factory server:app      # then: curl 'localhost:8000/stream?seed=1'
python examples/server.py                            # draws without a server
"""

import anyio
import torch

import clockwork_hooks as ch
from clockwork_hooks.demo import DEMO_PROMPTS, load_demo


class Service:
    """The demo model's UNet, wrapped once for all requests; as many of them run at a time as there are places."""

    def __init__(self, *, steps=8, at_once=2):
        demo, self.steps = load_demo(), steps
        self.cw, self.text = ch.wrap(demo.unet), demo.encode_prompts(DEMO_PROMPTS[:1], guided=False)
        self.places = anyio.Semaphore(at_once)  # each run keeps a feature, so memory is bounded

    def sample(self, seed):  # the block tells the calls of this run from those of the others
        x = torch.randn(1, 12, 32, 32, generator=torch.Generator().manual_seed(seed))
        with self.cw.trajectory():
            for t in torch.linspace(999, 0, self.steps):
                with torch.no_grad():
                    x = x - self.cw(x, t, self.text).sample / self.steps
                yield x

    async def stream(self, seed):  # each step runs in whatever thread of the pool is free
        async with self.places:
            run = self.sample(seed)
            while (x := await anyio.to_thread.run_sync(next, run, None)) is not None:
                yield f"{float(x.mean()):.6f}\n"

    async def draw(self, seed):
        async with self.places:
            return (await anyio.to_thread.run_sync(list, self.sample(seed)))[-1]


def app():
    import fastapi

    api, service = fastapi.FastAPI(), Service()

    @api.get("/stream")
    async def stream(seed: int = 0):  # likewise a /draw, with `await service.draw(seed)`
        return fastapi.responses.StreamingResponse(service.stream(seed), media_type="text/plain")

    return api


def main():
    print(anyio.run((service := Service()).draw, 1).shape, service.cw.report())


if __name__ == "__main__":
    main()
