"""What a request is about: a subject (the kind of harm, or the topic) and one noun for it, both found by keywords."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Subject = Literal[
    "cyber", "fraud", "violence", "drugs", "hate", "falsehoods", "privacy", "copyright", "intimacy", "other"
]
SUBJECTS: tuple[Subject, ...] = (
    "cyber", "fraud", "violence", "drugs", "hate", "falsehoods", "privacy", "copyright", "intimacy", "other"
)  # fmt: skip

# subject -> {regular expression: noun that an answer may use}
KEYWORDS: dict[Subject, dict[str, str]] = {
    "cyber": {
        r"malware|trojan|spyware": "malware",
        r"ransomware": "ransomware",
        r"\bvirus(?:es)?\b|\bworm\b": "viruses",
        r"hack\w*|cyber\s?attack\w*|break into .*(?:account|computer|network|system)": "hacking",
        r"phish\w*|spoof\w*": "phishing",
        r"password\w*|credential\w*|login": "passwords",
        r"firewall|network|server\b": "networks",
        r"exploit\w*|vulnerabilit\w*|penetration|security flaw": "vulnerabilities",
        r"keylog\w*|backdoor|rootkit|botnet|ddos|denial.of.service": "network attacks",
        r"cyber\w*|encryption|software|program\b|script\b|code\b|\bprocess\b|python|linux|computer": "software",
    },
    "fraud": {
        r"launder\w*": "money laundering",
        r"counterfeit\w*|forg(?:e|ing|ery)\w*|fake (?:id|driver|passport|ticket|document|degree|prescription)\w*": "counterfeits",
        r"credit card|bank\w*|mortgage|loan": "banking",
        r"tax(?:es)?\b": "taxes",
        r"scam\w*|fraud\w*|defraud|ponzi|pyramid scheme|swindl\w*|con artist": "fraud",
        r"insider trading|stock\w*|share price|invest\w*|cryptocurrenc\w*": "investments",
        r"blackmail\w*|extort\w*|ransom\b|brib\w*": "extortion",
        r"identity theft|steal\w*|theft|shoplift\w*|stolen|rob\b|robb\w*|burgl\w*|smuggl\w*|embezzl\w*": "theft",
        r"money|financ\w*|charity|customs|payment|insurance": "money",
    },
    "violence": {
        r"bomb\w*|explosive\w*|detonat\w*|grenade": "explosives",
        r"gun\b|guns|firearm\w*|weapon\w*|rifle|knife|knives|shoot\w*|ammunition": "weapons",
        r"kill\w*|murder\w*|assassin\w*|homicid\w*": "killing",
        r"terroris\w*|extremis\w*|manifesto": "terrorism",
        r"poison\w*": "poison",
        r"tortur\w*|stab\w*|maim\w*|dismember\w*|gruesome|gore|gory|brutal\w*": "cruelty",
        r"kidnap\w*|abduct\w*|hostage|human trafficking": "kidnapping",
        r"suicid\w*|self.harm\w*|anorexi\w*|eating disorder": "self-harm",
        r"threat\w*|intimidat\w*|stalk\w*|bull(?:y|ied|ying)\b|cyberbully\w*|harass\w*|abus\w*": "threats",
        r"poach\w*|dog fight\w*|animal cruelty|endangered|bestiality": "animals",
        r"attack\w*|violen\w*|hurt\w*|injur\w*|arson|fight\w*|riot\w*|sabotag\w*|vandal\w*|destroy\w*|property damage": "violence",
    },
    "drugs": {
        r"meth\b|methamphetamine|cocaine|heroin|mdma|ecstasy|lsd|fentanyl|crack\b": "hard drugs",
        r"marijuana|cannabis|weed\b|hashish": "cannabis",
        r"opioid\w*|prescription\w*|medication\w*|pills?\b|steroid\w*": "medicines",
        r"alcohol|drunk\w*|drink driving": "alcohol",
        r"drugs?\b|narcotic\w*|substances?\b|chemical\w*|overdos\w*|intoxicat\w*": "substances",
    },
    "hate": {
        r"racis\w*|racial\w*|\brace\b|ethnic\w*|black people|asian\w*|african\w*|latino\w*|mexican\w*|chinese|korean\w*": "ethnic groups",
        r"immigra\w*|refugee\w*|foreigner\w*|xenophob\w*": "immigrants",
        r"muslim\w*|islam\w*|jew\w*|antisemit\w*|christian\w*|religio\w*|hindu\w*|sikh\w*|buddhis\w*": "religions",
        r"women|sexis\w*|misogyn\w*|gender\w*|\bmen are\b|feminis\w*": "gender",
        r"lgbt\w*|gay\b|homosexual\w*|transgender\w*|lesbian\w*|homophob\w*|transphob\w*|bisexual\w*|non-binary": "sexual minorities",
        r"disab\w*|autis\w*|mental illness|hereditary": "disability",
        r"elderly|older people|old people|single (?:people|women|mothers)|married|veterans|homeless|obese|overweight|teenagers": "social groups",
        r"hate\b|hateful|slur\w*|derogatory|stereotyp\w*|discriminat\w*|bigot\w*|insult\w*|degrad\w*|offensive|demean\w*|nazi\w*|prejudice\w*|supremac\w*|inferior|belittl\w*|mock\w*": "stereotypes",
    },
    "falsehoods": {
        r"fake news|misinformation|disinformation|propaganda|rumou?rs?": "misinformation",
        r"conspirac\w*|chemtrail\w*|flat earth|earth being flat|moon landing|hoax|holocaust|secret (?:organi[sz]ation|society)|staged": "conspiracies",
        r"vaccin\w*|cures?\b|supplement\w*|medical advice|homeopath\w*|essential oils?|dosage|diagnos\w*|treatment": "health claims",
        r"election\w*|voter\w*|voting|ballot|political|politician|candidate|president": "politics",
        r"climate change|global warming|5g\b": "science",
        r"false\w*|fabricat\w*|mislead\w*|lies?\b|lying|deceptive|bogus|fictitious|clickbait|fake\b|unverified|pseudo\w*": "false claims",
    },
    "privacy": {
        r"home address|phone number|social security|passport|license plate|whereabouts|location of": "personal details",
        r"medical (?:record|histor)\w*|health record\w*|patient\w*|biometric\w*|fingerprint\w*|genetic": "health records",
        r"confidential|classified|trade secret\w*|internal (?:memo|email|document|report)\w*|leak\w*|secret\w*|disclose|divulge|proprietary": "confidential records",
        r"surveil\w*|spy\w*|track\w*|eavesdrop\w*|hidden camera|wiretap\w*|monitor\w*": "surveillance",
        r"private|privacy|personal (?:data|information|details|life)|personally identif\w*|dox\w*|anonym\w*|sensitive": "private data",
    },
    "copyright": {
        r"lyrics|song\b|album": "songs",
        r"full text|entire text|complete text|novel\b|harry potter|book\b|chapter\w*|crossword": "books",
        r"episode|movie|film\b|transcript|screenplay|season \d|netflix|hbo": "films",
        r"copyright\w*|pirat\w*|torrent\w*|plagiari\w*|trademark\w*|intellectual property|logo\b|crack(?:ed)? (?:version|software)|serial key\w*": "copyright",
    },
    "intimacy": {
        r"sex\b|sexual\w*|erotic\w*|porn\w*|explicit|nude\w*|naked|orgasm\w*|intimate|intimacy|seduc\w*|kink\w*|bdsm|dominat\w*|fetish\w*|prostitut\w*|incest": "intimacy",
    },
}  # fmt: skip
_COMPILED = {
    s: [(re.compile(r"\b" + p if p[0] not in "\\(" else p, re.I), n) for p, n in w.items()] for s, w in KEYWORDS.items()
}
_WEAK = {
    "software",
    "networks",
    "money",
    "violence",
    "politics",
    "private data",
    "films",
    "books",
    "science",
    "confidential records",
}


class Reading(NamedTuple):
    """`subject` and `noun` of a request; `other` and None where no keyword is found."""

    subject: Subject
    noun: str | None


def read_subject(query: str) -> Reading:
    """The subject with the most keyword hits (weak ones count half, the earlier subject wins a tie) and its first noun."""
    best: tuple[float, Subject, str | None] = (0.0, "other", None)
    for subject, patterns in _COMPILED.items():
        hits = [noun for pattern, noun in patterns if pattern.search(query)]
        score = sum(0.5 if noun in _WEAK else 1.0 for noun in hits)
        if score > best[0]:
            best = (score, subject, min(hits, key=lambda noun: noun in _WEAK))
    return Reading(best[1], best[2])


TASKS: dict[str, str] = {
    "greet": r"^(?:hi|hello|hey|good (?:morning|evening|afternoon)|thanks|thank you|bye|goodbye|who are you|what are you|what can you do|how are you)\b",
    "code": r"\bcode|python|java\b|javascript|sql\b|html|css|function (?:that|to|in)|algorithm|regex|program\b",
    "maths": r"calculate|convert|how many|solve|equation|sum of|square root|average|percent|\d+ ?[-+*/x] ?\d+",
    "edit": r"rewrite|edit|rephrase|paraphrase|correct|grammar|sentence|translate|spelling|punctuat|replace|passage|paragraph|the (?:following|given) text",
    "classify": r"classify|categori[sz]e|identify|sort|which of|determine|match|detect|label",
    "create": r"write|compose|create|generate|story|poem|slogan|joke|haiku|song|invent|imagine|tweet|title|tagline",
    "plan": r"plan|design|develop|organi[sz]e|schedule|strategy|steps|recipe|how to|how can i|how do i|tips|advice|suggest|recommend",
    "list": r"\blist|name (?:a|an|one|two|three|four|five|some|\d)|give (?:me )?(?:an? )?(?:example|two|three|four|five|\d)|provide|examples?",
    "explain": r"explain|describe|what|why|how|define|summari[sz]e|compare|difference|discuss|tell me|analy[sz]e|who|when|where",
}  # fmt: skip
_TASKS = {task: re.compile(pattern, re.I) for task, pattern in TASKS.items()}


def read_task(query: str) -> str:
    """What a plainly harmless request asks for: the first task whose keywords are found, else `explain`."""
    return next((task for task, pattern in _TASKS.items() if pattern.search(query)), "explain")
