"""The noise schedules: name -> "module:function". To add one: its file, and one line here.

A function takes the number of steps N and the multipliers of the latent frames (F,), and gives levels (N + 1, F).
"""

NOISE_SCHEDULES = {
    "linear_quadratic": "pusa.diffusion.noise_schedules.linear_quadratic:levels",
    "shifted": "pusa.diffusion.noise_schedules.shifted:levels",
}
