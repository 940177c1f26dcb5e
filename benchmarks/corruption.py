"""What ADDP's corrupted targets cost a training step, in shares of the step without them.

    python benchmarks/corruption.py                     # 55 M parameters, SD's VAE, 256 px
    python benchmarks/corruption.py --size tiny --resolution 128 --batch 8

The step is that of the denoising method on depth: the trainer's own, with the noise of Marigold.
"corrupted" makes the noisy latents of blurred depth. Where the network predicts v or x_0, the clean
latents are wanted as well and the frozen encoder runs once more; --prediction epsilon wants the
noise only. "blur alone" is the corruption of the same batch in a program of its own, "encoder
alone" the pass.
"""

from __future__ import annotations

from statistics import median

import common
import jax
import jax.numpy as jnp
from train_step import Step, make_batch, step_of

from jaxpercept.diffusion.corruption import intensity
from jaxpercept.diffusion.sampler import Solver
from jaxpercept.diffusion.timesteps import TimestepPolicy
from jaxpercept.methods.denoising import Denoising
from jaxpercept.models.vae import encode_mean
from jaxpercept.tasks.depth import DEPTH


def main() -> None:
    p = common.parser(__doc__.split("\n\n")[0], ("50m", "tiny", "sd21", "sd15"))
    p.add_argument(
        "--prediction",
        choices=("v_prediction", "epsilon", "sample"),
        default="v_prediction",
        help="what the network predicts",
    )
    p.set_defaults(resolution=[256])
    args = p.parse_args()
    common.use_device(args.device)

    model = common.jax_model(args.size, args.dtype, in_channels=8)
    batch = make_batch(args)
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": args.prediction}

    def step(corruption: str) -> Step:
        method = Denoising(
            model,
            DEPTH,
            Solver.from_config(scheduler),
            TimestepPolicy.parse("uniform"),
            args.batch,
            corruption=corruption,
        )
        return step_of(method, common.jax_weights(model), batch, args.dtype)

    on_device = {name: jnp.asarray(x) for name, x in batch.items()}
    timesteps = jnp.linspace(0, 999, args.batch).astype(jnp.int32)
    keys = jax.random.split(jax.random.key(0), args.batch)
    blur = jax.jit(lambda b, t: DEPTH.corrupt(b, intensity(t, 1000, "increasing"), keys))
    weights = common.put({"vae": common.jax_weights(model)["vae"]}, args.dtype)
    encode = jax.jit(lambda w, x: encode_mean(model.vae, w["vae"], x))
    image = blur(on_device, timesteps)
    calls = {
        "step": step("none"),
        "corrupted": step("increasing"),
        "blur alone": lambda: jax.block_until_ready(blur(on_device, timesteps)),
        "encoder alone": lambda: jax.block_until_ready(encode(weights, image)),
    }
    times = common.interleave(calls, args.repeats)

    side, whole = args.resolution[0], times["step"]
    print(f"\n{args.size}, {args.batch} x {side} px, {args.dtype}, {args.prediction}")
    common.print_table(
        [
            {
                "": name,
                "seconds": f"{min(t):.4g} / {median(t):.4g}",
                "share of the step": f"{min(t) / min(whole):.1%} / {median(t) / median(whole):.1%}",
            }
            for name, t in times.items()
        ]
    )
    results = {"machine": common.machine(args.device), "options": vars(args), "seconds": times}
    common.finish(results, args.output)


if __name__ == "__main__":
    main()
