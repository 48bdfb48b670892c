"""The base models Pusa can vectorize: name -> "module:class". To add one: its file, and one line here."""

BACKBONES = {
    "mochi": "pusa.backbones.mochi.backbone:Mochi",
}
