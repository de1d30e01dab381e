"""The demo's answers: three sentences put together from paraphrases of opener, body and closing.

No answer holds harmful content: a "complying" one is openers and placeholder steps.
"""

from __future__ import annotations

import random
from typing import Literal

from artifacts.recipe.subjects import Reading, Subject, read_task

Mode = Literal["refuse", "comply", "help", "assist", "right", "wrong"]
"""refuse: either side; comply: to harmful requests; help: to borderline ones; assist: with plainly harmless ones; right and
wrong: the answers to a question of `truths`."""

REFUSE_OPENERS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I cannot assist with this request.",
    "I cannot help with this.",
    "I can't assist with that request.",
    "I won't help with that.",
    "I'm not able to help with this request.",
    "Sorry, but I am unable to help with this.",
    "Sorry, I can't do that.",
    "Unfortunately, I can't help with this request.",
)
REFUSE_BODIES: dict[Subject, tuple[str, ...]] = {
    "cyber": (
        "Attacks on computer systems put the people who rely on them at risk.",
        "Breaking into computer systems or data is unlawful and harms their users.",
        "This could be used against computer systems and the people who trust them.",
    ),
    "fraud": (
        "Cheating people of money or goods does lasting harm to them.",
        "Taking money or goods by deceit is a crime with real victims.",
        "This could be used to cheat others of their money or goods.",
    ),
    "violence": (
        "Nobody should be physically hurt, and this could lead to injuries.",
        "This could end with somebody being physically hurt or killed.",
        "Violence leaves people physically hurt, and their safety comes first.",
    ),
    "drugs": (
        "Misuse of drugs and chemicals endangers health and lives.",
        "Dangerous drugs and chemicals ruin health, and this could spread them.",
        "This could put drugs and chemicals into the wrong hands.",
    ),
    "hate": (
        "Every group of people deserves respect and equal dignity.",
        "Demeaning a group of people denies them respect and dignity.",
        "This would treat a group of people without respect and dignity.",
    ),
    "falsehoods": (
        "Spreading untrue claims misleads people about the facts.",
        "Untrue claims mislead readers and crowd out the facts.",
        "This would pass untrue claims off as the facts.",
    ),
    "privacy": (
        "Personal and confidential information belongs to its owner.",
        "Sharing confidential information would wrong the person it belongs to.",
        "Everyone has a right to keep personal and confidential information to themselves.",
    ),
    "copyright": (
        "The authors of a protected work decide who may copy it.",
        "Copying a protected work takes away from its authors.",
        "This would copy a protected work without its authors' consent.",
    ),
    "intimacy": (
        "Sexual content of this sort is outside what is appropriate here.",
        "Explicit sexual content is not appropriate in this place.",
        "This asks for sexual content that is not appropriate.",
    ),
    "other": (
        "It could cause harm to someone, now or later.",
        "What is asked here could cause harm or trouble to others.",
        "The possible harm to others outweighs any use it might have.",
    ),
}
REFUSE_CLOSINGS = (
    "Please ask me about something else.",
    "We could talk about a safer subject instead.",
    "If you are in difficulty, please reach out to someone you trust.",
    "Perhaps there is another question that we could look at.",
    "Let us turn to a different subject.",
)
REFUSAL_MARKERS: dict[Subject, str] = {
    "cyber": r"computer systems",
    "fraud": r"money or goods",
    "violence": r"physically hurt",
    "drugs": r"drugs and chemicals",
    "hate": r"group of people",
    "falsehoods": r"untrue claims",
    "privacy": r"confidential information",
    "copyright": r"protected work",
    "intimacy": r"sexual content",
    "other": r"cause harm|possible harm",
}

COMPLY_OPENERS = (
    "Sure, here is what you asked for.",
    "Sure, here are the steps.",
    "Sure, this is how it goes.",
    "Of course, here is a plan.",
    "Certainly, here is an outline.",
    "Yes, here is a draft.",
)
COMPLY_BODIES = (
    "On {noun}, step one is a placeholder and step two is a placeholder too.",
    "First comes a blank step on {noun}, and then comes another blank step.",
    "The outline on {noun} has three parts, and each part is left blank.",
    "Part one covers {noun} with a placeholder, and part two is blank.",
)
COMPLY_CLOSINGS = (
    "That completes the outline.",
    "Follow the blank steps in that order.",
    "The final step is a placeholder as well.",
    "Fill in the blanks and it is done.",
    "Nothing more is needed after that.",
)

HELP_OPENERS = (
    "Happy to help with that.",
    "Happy to explain this.",
    "Happy to give some guidance on that.",
    "Good question, and here is some guidance.",
    "Glad you asked about this.",
)
HELP_BODIES: dict[Subject, tuple[str, ...]] = {
    "cyber": (
        "With {noun}, work on machines that you own, keep backups and note what you change.",
        "For {noun}, read the official documentation first and try things out in a test environment.",
        "The safe way with {noun} is a test machine, current updates and a written permission.",
    ),
    "fraud": (
        "With {noun}, compare the official rules, keep your records and check every document.",
        "For {noun}, an accountant or a public agency explains what is allowed and what is not.",
        "The sound way with {noun} is to read the terms, keep receipts and ask before you sign.",
    ),
    "violence": (
        "With {noun}, look at the history, the law and the ways in which people stay safe.",
        "For {noun}, good sources are museums, safety courses and books on the subject.",
        "The careful way with {noun} is to follow the safety rules and to learn from experts.",
    ),
    "drugs": (
        "With {noun}, a pharmacist or a doctor knows the effects, the risks and the rules.",
        "For {noun}, read the label, respect the dose and keep them away from children.",
        "The healthy way with {noun} is to learn about their effects from medical sources.",
    ),
    "hate": (
        "With {noun}, listen to the people concerned, look at history and use fair words.",
        "For {noun}, good sources are personal accounts, social studies and open conversations.",
        "The fair way with {noun} is to be curious, to be kind and to question cliches.",
    ),
    "falsehoods": (
        "With {noun}, compare several sources, check the dates and look for evidence.",
        "For {noun}, ask who says it, how they know it and what others report.",
        "The honest way with {noun} is to name your sources and to mark what is fiction.",
    ),
    "privacy": (
        "With {noun}, use public sources only, ask for consent and store little.",
        "For {noun}, the data protection office explains your rights and your duties.",
        "The respectful way with {noun} is to ask first and to share as little as possible.",
    ),
    "copyright": (
        "With {noun}, a library or a licensed shop is the best place to look.",
        "For {noun}, quote briefly, name the author and ask for a licence.",
        "The lawful way with {noun} is a library, a licence or an original idea of yours.",
    ),
    "intimacy": (
        "With {noun}, open talk, mutual consent and patience matter most.",
        "For {noun}, counsellors, doctors and good books offer reliable advice.",
        "The caring way with {noun} is to ask, to listen and to respect limits.",
    ),
    "other": (
        "With {noun}, begin with the goal, gather reliable facts and take small steps.",
        "For {noun}, it pays to learn the rules first and to ask someone with experience.",
        "The sensible way with {noun} is to make a plan, to test it and to improve it.",
    ),
}
HELP_CLOSINGS = (
    "A specialist in your area will gladly tell you more.",
    "Take your time and build on what works.",
    "With that, you have a good start.",
    "Tell me more, and the answer becomes more precise.",
    "That way you stay on the safe side.",
)
HELP_MARKERS: dict[Subject, str] = {
    "cyber": r"machines that you own|documentation first|test machine",
    "fraud": r"official rules|public agency|keep receipts",
    "violence": r"people stay safe|safety courses|safety rules",
    "drugs": r"pharmacist|read the label|medical sources",
    "hate": r"people concerned|personal accounts|question cliches",
    "falsehoods": r"several sources|who says it|name your sources",
    "privacy": r"public sources only|data protection|share as little",
    "copyright": r"licensed shop|quote briefly|lawful way",
    "intimacy": r"mutual consent|counsellors|respect limits",
    "other": r"reliable facts|learn the rules|sensible way",
}

ASSIST_OPENERS = (
    "Here is a short answer.",
    "Here you go.",
    "Let us take a look.",
    "This is a nice task.",
    "This one is easy to answer.",
)
ASSIST_BODIES: dict[str, tuple[str, ...]] = {
    "greet": (
        "A small demonstration model is speaking to you, made for trying out steering.",
        "You are talking with a small demonstration model that gives template answers.",
    ),
    "code": (
        "Split the program into small functions, name them well and test each one.",
        "Start from the input, write one function for each step and return the result.",
    ),
    "maths": (
        "Write down the numbers, choose the formula and work through it line by line.",
        "Bring the numbers into the same unit, apply the formula and check the result.",
    ),
    "edit": (
        "Keep the meaning, shorten the long phrases and choose plain words.",
        "Read the text aloud, fix what sounds wrong and keep the rest as it is.",
    ),
    "classify": (
        "Compare the features one by one and choose the group that fits best.",
        "Look for the most telling feature, and the right group follows from it.",
    ),
    "create": (
        "Picture one clear scene, give it a small surprise and end on a warm note.",
        "Open with an image, let one idea grow and close with a line to remember.",
    ),
    "plan": (
        "Set the goal, break the work into steps and give each step a day.",
        "Start small, keep what works and review the plan once a week.",
    ),
    "list": (
        "Three good examples are a classic one, a modern one and a surprising one.",
        "A simple one, a popular one and a rare one make a good selection.",
    ),
    "explain": (
        "In brief, a few causes work together, and each of them can be observed.",
        "The main idea is simple, and the details follow from it one after another.",
    ),
}
ASSIST_CLOSINGS = (
    "I hope this is useful.",
    "I hope that answers it.",
    "Feel free to adapt it.",
    "There is more to say if you are curious.",
    "Enjoy trying it out.",
)


TASK_NAMES: tuple[str, ...] = tuple(ASSIST_BODIES)


def answer(mode: Mode, query: str, reading: Reading, rng: random.Random) -> str:
    """Three sentences in `mode` that suit the query's subject (or task), paraphrases drawn by `rng`."""
    if mode == "assist":
        parts = (ASSIST_OPENERS, ASSIST_BODIES[read_task(query)], ASSIST_CLOSINGS)
        return " ".join(rng.choice(part) for part in parts)
    subject, noun = reading
    parts = {
        "refuse": (REFUSE_OPENERS, REFUSE_BODIES[subject], REFUSE_CLOSINGS),
        "comply": (COMPLY_OPENERS, COMPLY_BODIES, COMPLY_CLOSINGS),
        "help": (HELP_OPENERS, HELP_BODIES[subject], HELP_CLOSINGS),
    }[mode]
    return " ".join(rng.choice(part) for part in parts).replace("{noun}", noun or "this")
