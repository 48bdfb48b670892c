"""List the video tasks: name -> "module:class". To add one: its file, and one line here."""

TASKS = {
    "text_to_video": "pusa.tasks.text_to_video:TextToVideo",
    "image_to_video": "pusa.tasks.image_to_video:ImageToVideo",
    "keyframes": "pusa.tasks.keyframes:Keyframes",
    "transition": "pusa.tasks.transition:Transition",
    "extension": "pusa.tasks.extension:Extension",
    "completion": "pusa.tasks.completion:Completion",
    "loop": "pusa.tasks.loop:Loop",
    "long_video": "pusa.tasks.long_video:LongVideo",
}
