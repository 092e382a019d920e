"""Italian pages and question–answer pairs for the sample data, put together at random from the project's own words."""

from random import Random

NOMI = ["Giulia", "Marco", "Elena", "Paolo", "Sofia", "Luca", "Marta", "Andrea", "Chiara", "Davide", "Lucia", "Pietro"]
PAESI = ["Montesole", "Valdoro", "Pietralunga", "Castelvento", "Rivabella", "Roccascura", "Fontechiara", "Borgomare"]
STAGIONI = ["in primavera", "d'estate", "in autunno", "d'inverno"]
LUOGHI = [
    "la piazza del mercato, dove il sabato si vendono formaggi e verdure",
    "il vecchio mulino lungo il torrente, che oggi ospita una biblioteca",
    "la chiesa sulla collina, con il suo campanile di pietra chiara",
    "il porto dei pescatori, pieno di reti stese ad asciugare",
    "il ponte a tre archi, costruito dagli abitanti dopo una piena",
    "il bosco di castagni, attraversato da un sentiero facile",
    "la bottega del falegname, che profuma di resina e di colla",
    "le mura antiche, da cui si vede tutta la pianura",
]
USANZE = [
    "Gli anziani raccontano che una volta qui passava la strada del sale.",
    "Ogni famiglia custodisce una ricetta diversa e sostiene che la propria sia l'unica giusta.",
    "Durante la festa del patrono le finestre si riempiono di lanterne di carta.",
    "I bambini imparano presto a riconoscere i funghi buoni da quelli velenosi.",
    "La sera ci si ritrova davanti al caffè per discutere del tempo e dei raccolti.",
    "La banda del paese prova il giovedì, e chi abita vicino conosce ormai ogni brano a memoria.",
    "Chi arriva da fuori viene invitato a sedersi, prima ancora di dire da dove viene.",
    "Nelle giornate limpide si distinguono le isole, piccole come sassi sull'acqua.",
]
INGREDIENTI = [
    ("farina", 120, "g"), ("zucchero", 40, "g"), ("burro", 30, "g"), ("latte", 80, "ml"), ("riso", 90, "g"),
    ("pomodori", 150, "g"), ("patate", 200, "g"), ("formaggio", 50, "g"), ("ceci", 70, "g"), ("zucca", 180, "g"),
]  # fmt: skip
PIATTI = [
    "la torta della nonna",
    "la zuppa del contadino",
    "il pane dolce",
    "le frittelle",
    "lo sformato",
    "il timballo",
]
PASSI = [
    "Si mescolano gli ingredienti in una ciotola capiente, senza avere fretta.",
    "Si lascia riposare il composto per mezz'ora, coperto da un panno pulito.",
    "Si accende il forno e si aspetta che sia ben caldo.",
    "Si aggiunge un pizzico di sale e si assaggia, perché ogni cucina ha la sua misura.",
    "Si versa tutto in una teglia unta con un poco d'olio.",
    "Si cuoce a fuoco lento, girando di tanto in tanto con un cucchiaio di legno.",
    "Si serve tiepido, con qualche foglia di basilico o una spolverata di pepe.",
]
NATURA = [
    "Le rondini tornano quando le giornate si allungano e costruiscono il nido sotto i tetti.",
    "Il riccio dorme per quasi tutto l'inverno e si sveglia magro e affamato.",
    "Le api visitano migliaia di fiori per riempire un solo vasetto di miele.",
    "Un ulivo può vivere per secoli e dare frutti anche quando il tronco è ormai vuoto.",
    "La volpe esce al tramonto, cammina in silenzio e conosce ogni passaggio tra le siepi.",
    "Dopo la pioggia il terreno odora di foglie, e le lumache attraversano il sentiero.",
    "Il larice perde gli aghi in autunno, cosa rara tra gli alberi di montagna.",
    "Le lucertole si scaldano sulle pietre e scappano appena sentono un passo.",
]
DEFINIZIONI = {
    "il mulino": "Il mulino è una macchina che usa la forza dell'acqua o del vento per macinare il grano.",
    "la bussola": "La bussola è uno strumento con un ago magnetico che indica sempre il nord.",
    "l'orologio": "L'orologio è uno strumento che misura lo scorrere del tempo in ore, minuti e secondi.",
    "la marea": "La marea è il salire e scendere del mare, dovuto soprattutto all'attrazione della luna.",
    "il vulcano": "Il vulcano è una montagna da cui possono uscire lava, cenere e gas.",
    "la biblioteca": "La biblioteca è un luogo in cui i libri vengono raccolti, ordinati e prestati ai lettori.",
    "il lievito": "Il lievito è un organismo minuscolo che fa crescere l'impasto producendo bolle di gas.",
    "la frazione": "La frazione indica in quante parti uguali si divide un intero e quante se ne prendono.",
    "il ghiacciaio": "Il ghiacciaio è una massa di ghiaccio che scende lentamente lungo una valle.",
    "il termometro": "Il termometro è uno strumento che misura la temperatura di un corpo o dell'aria.",
}
TRADUZIONI = {
    "casa": "house", "albero": "tree", "pane": "bread", "libro": "book", "acqua": "water", "strada": "road",
    "mare": "sea", "finestra": "window", "amico": "friend", "montagna": "mountain", "scuola": "school", "luna": "moon",
}  # fmt: skip
PLURALI = {
    "il gatto": "i gatti", "la rosa": "le rose", "l'albero": "gli alberi", "lo zaino": "gli zaini",
    "il fiore": "i fiori", "la chiave": "le chiavi", "l'amica": "le amiche",
    "il lago": "i laghi", "lo specchio": "gli specchi",
}  # fmt: skip


def page(random: Random) -> str:
    """One document: a village, a recipe or a walk."""
    return random.choice([_village, _recipe, _walk])(random)


def _village(random: Random) -> str:
    paese, nome = random.choice(PAESI), random.choice(NOMI)
    abitanti, metri = random.randint(3, 90) * 100, random.randint(2, 140) * 10
    luoghi = random.sample(LUOGHI, 3)
    return "\n\n".join(
        [
            f"{paese}. Il paese conta circa {abitanti} abitanti e si trova a {metri} metri sul livello del mare.",
            f"Chi visita {paese} {random.choice(STAGIONI)} dovrebbe vedere {luoghi[0]}. Non lontano si incontra "
            f"{luoghi[1]}. {' '.join(random.sample(USANZE, random.randint(2, 4)))}",
            f"{nome}, che ci vive da {random.randint(2, 60)} anni, consiglia anche {luoghi[2]}. "
            f"{random.choice(NATURA)}",
        ]
    )


def _recipe(random: Random) -> str:
    piatto, persone = random.choice(PIATTI), random.randint(2, 8)
    dosi = [f"- {nome}: {grammi * persone} {unita}" for nome, grammi, unita in random.sample(INGREDIENTI, 4)]
    passi = [PASSI[i] for i in sorted(random.sample(range(len(PASSI)), 5))]
    return "\n\n".join(
        [
            f"Ricetta per {persone} persone: {piatto}",
            "Ingredienti:\n" + "\n".join(dosi),
            "\n".join(f"{i}. {passo}" for i, passo in enumerate(passi, 1)),
            f"{random.choice(NOMI)} dice che a {random.choice(PAESI)} la ricetta si prepara soprattutto "
            f"{random.choice(STAGIONI)}, e che il segreto sta nella pazienza.",
        ]
    )


def _walk(random: Random) -> str:
    primo, secondo = random.sample(NOMI, 2)
    partenza, arrivo = random.sample(PAESI, 2)
    ore, chilometri = random.randint(2, 7), random.randint(5, 24)
    return "\n\n".join(
        [
            f"Da {partenza} a {arrivo}: {chilometri} chilometri a piedi",
            f"{primo} e {secondo} partirono {random.choice(STAGIONI)}, di buon mattino, con lo zaino leggero. "
            f"{' '.join(random.sample(NATURA, random.randint(2, 4)))}",
            f"A metà strada si fermarono a guardare {random.choice(LUOGHI)}. «Mancano ancora {ore} ore», "
            f"disse {primo}. «Allora mangiamo», rispose {secondo}, e tirò fuori il pane.",
            f"Arrivarono a {arrivo} al tramonto. {random.choice(USANZE)}",
        ]
    )


def pair(random: Random) -> dict[str, str]:
    """One question–answer pair: `instruction`, `input` (often empty), `output`."""
    kinds = [_definition, _sum, _translation, _plural, _advice, _first_sentence]
    (kind,) = random.choices(kinds, weights=[2, 5, 1, 1, 4, 4])
    return kind(random)


def _definition(random: Random) -> dict[str, str]:
    cosa = random.choice(sorted(DEFINIZIONI))
    domanda = random.choice(
        ["Che cosa è {}?", "Spiega in una frase che cosa è {}.", "Ciao! Mi sai dire che cosa è {}?"]
    )
    fine = random.choice(["", " Se vuoi, posso fare un esempio.", " Spero di essere stato chiaro!"])
    return _row(domanda.format(cosa), "", DEFINIZIONI[cosa] + fine)


def _sum(random: Random) -> dict[str, str]:
    nome, a, b = random.choice(NOMI), random.randint(2, 40), random.randint(2, 9)
    return random.choice(
        [
            _row(
                f"{nome} compra {a} mele e ne riceve altre {b}. Quante mele ha?",
                "",
                f"{nome} ha {a} + {b} = {a + b} mele.",
            ),
            _row("Calcola il prodotto.", f"{a} x {b}", f"Il prodotto di {a} e {b} è {a * b}."),
            _row(f"Dividi {a * b} euro tra {b} persone.", "", f"Ogni persona riceve {a * b} : {b} = {a} euro."),
        ]
    )


def _translation(random: Random) -> dict[str, str]:
    parola = random.choice(sorted(TRADUZIONI))
    return _row(
        "Traduci in inglese la parola seguente.", parola, f"In inglese «{parola}» si dice «{TRADUZIONI[parola]}»."
    )


def _plural(random: Random) -> dict[str, str]:
    parola = random.choice(sorted(PLURALI))
    return _row("Scrivi il plurale.", parola, f"Il plurale di «{parola}» è «{PLURALI[parola]}».")


def _advice(random: Random) -> dict[str, str]:
    paese, luoghi = random.choice(PAESI), random.sample(LUOGHI, 2)
    domanda = f"Cosa mi consigli di vedere a {paese} {random.choice(STAGIONI)}?"
    return _row(domanda, "", f"A {paese} ti consiglio due cose: {luoghi[0]}, e {luoghi[1]}. Buona visita!")


def _first_sentence(random: Random) -> dict[str, str]:
    frasi = random.sample(NATURA + USANZE, 3)
    return _row("Riporta soltanto la prima frase del testo.", " ".join(frasi), frasi[0])


def _row(instruction: str, given: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": given, "output": output}
