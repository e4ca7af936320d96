"""Words for the templates about symbols, updates and negations; split like those of ``vocabulary``."""

SYMBOLS: list[tuple[list[str], str, list[str], str, list[str]]] = [
    # (things, key, its values, another key, values of that)
    (["valve 7", "valve 12", "inlet valve 3", "relief valve B"], "state", ["open", "closed"], "pressure", ["4 bar"]),
    (["valve 9", "valve A2", "the drain valve"], "status", ["open", "closed"], "flow", ["12 l/min", "0 l/min"]),
    (
        ["job 4412", "job 4419", "the import job", "build 881"],
        "status",
        ["running", "failed", "queued", "finished"],
        "priority",
        ["high", "low"],
    ),
    (
        ["order 90-113", "order 90-114", "order 71-002"],
        "status",
        ["shipped", "cancelled", "awaiting payment"],
        "carrier",
        ["DHL", "post"],
    ),
    (["door B2", "door C1", "gate 4"], "lock", ["engaged", "released"], "battery", ["80 %", "15 %"]),
    (
        ["pump P-101", "pump P-102", "compressor 3"],
        "mode",
        ["manual", "automatic", "standby"],
        "speed",
        ["1,450 rpm", "900 rpm"],
    ),
    (["node eu-3", "node eu-4", "broker 1"], "role", ["leader", "follower", "witness"], "version", ["2.4.1", "2.5.0"]),
    (
        ["ticket 5521", "ticket 5530", "case 12-77"],
        "phase",
        ["in triage", "in review", "resolved"],
        "owner",
        ["Priya Raman", "nobody"],
    ),
    (["sensor T4", "sensor T9", "probe 2"], "health", ["ok", "faulty"], "unit", ["celsius", "kelvin"]),
    (
        ["flag dark-mode", "flag new-checkout", "flag beta-search"],
        "value",
        ["on", "off"],
        "audience",
        ["staff", "everyone"],
    ),
    (["signal S14", "signal S15", "signal N2"], "aspect", ["red", "green", "amber"], "lamp", ["LED"]),
    (
        ["account 3307", "account 3312", "account 8800"],
        "standing",
        ["active", "suspended", "closed"],
        "currency",
        ["EUR", "CHF"],
    ),
    (["breaker Q3", "breaker Q8", "the main breaker"], "position", ["tripped", "latched in"], "rating", ["63 A"]),
    (["alarm zone K", "alarm zone L", "the vault alarm"], "arming", ["armed", "disarmed"], "siren", ["indoor"]),
    (["drone 31", "drone 36", "shuttle pod 2"], "dock", ["docked", "undocked", "in transit"], "payload", ["camera"]),
    (["tank row F", "tank row G", "silo J"], "level", ["brimming", "half-filled", "drained"], "content", ["rye"]),
    (["turbine W6", "turbine W9", "rotor 5"], "blades", ["feathered", "pitched", "braked"], "yaw", ["210 degrees"]),
    (["relay R-44", "relay R-45", "contactor 8"], "coil", ["energised", "de-energised"], "contacts", ["silver"]),
    (["record LX-9", "record LX-12", "file KV-3"], "retention", ["sealed off", "releasable"], "archivist", ["Doro"]),
]
CHANGEABLE: list[tuple[list[str], tuple[str, str, str], list[str]]] = [
    # (things, a verb now, in the past and bare, values of which one holds)
    (
        ["the Monday stand-up", "the budget review", "the night shift", "the yoga class"],
        ("starts at", "started at", "start at"),
        ["9:15", "10:30", "14:00", "22:00"],
    ),
    (
        ["the Leeds order", "the Osaka order", "the sample kit"],
        ("ships from", "shipped from", "ship from"),
        ["Rotterdam", "the Lyon depot", "Gdansk"],
    ),
    (
        ["the key to room 12", "the spare laptop", "the petty cash"],
        ("is kept in", "was kept in", "be kept in"),
        ["the top drawer", "the safe", "the reception desk", "cabinet 2"],
    ),
    (
        ["the speed limit on Hill Road", "the speed limit on the ring road", "the limit in the yard"],
        ("is", "was", "be"),
        ["30 km/h", "50 km/h", "70 km/h"],
    ),
    (
        ["the contact for refunds", "the contact for the press", "the fire warden of floor 3"],
        ("is", "was", "be"),
        ["Mira Holt", "Tomas Vidal", "Li Wei", "Sofia Lund"],
    ),
    (
        ["support for version 4", "support for version 5", "the pilot in Porto"],
        ("ends on", "ended on", "end on"),
        ["30 June", "15 September", "31 December"],
    ),
    (
        ["the parking fee at the station", "the fee for the locker", "the deposit for the hall"],
        ("is", "was", "be"),
        ["3 euros a day", "5 euros a day", "12 euros a day"],
    ),
    (
        ["the shuttle to the airport", "the school bus", "the coach to Leeds"],
        ("leaves from", "left from", "leave from"),
        ["gate 2", "bay 4", "the north car park"],
    ),
    (
        ["the retry limit of the mail gateway", "the retry limit of the metrics store", "the pool size of db-7"],
        ("is", "was", "be"),
        ["3", "5", "8", "20"],
    ),
    (
        ["the payroll export", "the stock count", "the certificate check"],
        ("runs every", "ran every", "run every"),
        ["hour", "night", "Friday"],
    ),
    (
        ["the login page", "the search cluster", "the price list"],
        ("is served by", "was served by", "be served by"),
        ["node-12", "the new cluster", "the image cache"],
    ),
    (
        ["the travel policy", "the leave policy", "the code of conduct"],
        ("allows for", "allowed for", "allow for"),
        ["two absences a year", "four absences a year", "no absences"],
    ),
    (
        ["the choir rehearsal", "the chess evening", "the life-drawing session"],
        ("meets in", "met in", "meet in"),
        ["the crypt", "the boathouse", "the loft above the bakery"],
    ),
    (
        ["the walnut cake", "the lentil soup", "the rhubarb tart"],
        ("sells for", "sold for", "sell for"),
        ["4.20 pounds", "6.80 pounds", "9.50 pounds"],
    ),
    (
        ["the understudy for the lead", "the referee of the semi-final", "the guest lecturer"],
        ("comes by the name of", "came by the name of", "come by the name of"),
        ["Sister Agnes", "Bartholomew Quist", "Imke Terpstra"],
    ),
    (
        ["the telescope", "the weather balloon", "the tide gauge"],
        ("sends its data to", "sent its data to", "send its data to"),
        ["the observatory on La Palma", "the polar institute", "the hydrographic office"],
    ),
    (
        ["the quarterly rebate", "the loyalty voucher", "the early-bird discount"],
        ("amounts to", "amounted to", "amount to"),
        ["4 per cent", "7 per cent", "11 per cent"],
    ),
    (
        ["the ferryman's lodge", "the toll house", "the signal box"],
        ("is in the hands of", "was in the hands of", "be in the hands of"),
        ["the abbey", "a family of weavers", "the heritage fund"],
    ),
]
DEEDS: list[tuple[str, str, str, tuple[str, str]]] = [  # (past, bare, participle, two objects)
    ("repaired", "repair", "repaired", ("the pump", "the fence")),
    ("signed", "sign", "signed", ("the lease", "the waiver")),
    ("restarted", "restart", "restarted", ("the billing service", "the cache")),
    ("painted", "paint", "painted", ("the shed", "the gate")),
    ("sold", "sell", "sold", ("the van", "the trailer")),
    ("read", "read", "read", ("the audit report", "the appendix")),
    ("called", "call", "called", ("the supplier", "the insurer")),
    ("cleaned", "clean", "cleaned", ("the oven", "the cold store")),
    ("deleted", "delete", "deleted", ("the old backups", "the test accounts")),
    ("paid", "pay", "paid", ("the electricity bill", "the fine")),
    ("visited", "visit", "visited", ("the Leeds office", "the Porto office")),
    ("wrote", "write", "written", ("the release notes", "the handbook")),
    ("translated", "translate", "translated", ("the libretto", "the sonnets")),
    ("pruned", "prune", "pruned", ("the quince", "the vines")),
    ("smuggled", "smuggle", "smuggled", ("the tortoise", "the saffron")),
    ("welded", "weld", "welded", ("the railing", "the hull")),
    ("embroidered", "embroider", "embroidered", ("the altar cloth", "the banner")),
    ("auctioned", "auction", "auctioned", ("the harpsichord", "the clavichord")),
]
REASONS = [
    "somebody had asked for it",
    "it was easy",
    "the boss insisted",
    "the rules demanded it",
    "the neighbours complained",
    "an inspection was near",
    "the doctor had advised so",
    "a bonus beckoned",
    "the almanac foretold it",
]
PARTS: list[tuple[list[str], list[str], list[str]]] = [  # (wholes, their parts, states)
    (
        ["the museum", "the castle", "the hospital"],
        ["the east wing", "the west wing", "the top floor"],
        ["closed", "open to visitors", "heated"],
    ),
    (["the contract", "the licence"], ["the first section", "the annex", "the last clause"], ["binding", "in force"]),
    (
        ["the cluster in Lyon", "the cluster in Leeds"],
        ["the primary zone", "the backup zone", "the edge"],
        ["down", "encrypted", "up to date"],
    ),
    (["the harbour", "the airport"], ["the north side", "the south side"], ["icy", "lit", "guarded"]),
    (["the archive", "the library"], ["the map section", "the newspaper section"], ["digitised", "complete"]),
    (["the report", "the manual"], ["the summary", "the second chapter", "the glossary"], ["proofread", "approved"]),
    (["the orchard wall", "the sea wall"], ["the lower stretch", "the upper stretch"], ["crumbling", "overgrown"]),
    (["the opera", "the oratorio"], ["the overture", "the finale"], ["scored for brass", "in a minor key"]),
    (["the glacier", "the ice shelf"], ["the tongue", "the rim"], ["crevassed", "melting"]),
]
