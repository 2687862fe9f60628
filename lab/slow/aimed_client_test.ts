/**
 * An evil server aims its clients: at their own host, at multicast and broadcast addresses, at strangers. They send
 * nothing to the former, and no flood to the latter.
 *
 * @module
 */
import assert from "node:assert/strict";
import { test } from "node:test";
import type { ControlBody, Endpoint } from "../../protocol.ts";
import { type Control, formatEndpoint, hostOf, keysFrom, scopeOf } from "../../protocol.ts";
import { type Evil, evil, rewrite } from "../evil.ts";
import { watchAll } from "../fiend.ts";
import { dice, isStun, like, type Rogue, rogueCrowd } from "../hostile.ts";
import { createWorld, join, login, type PlayerOptions, type World } from "../scenario.ts";
import { LONG, many, numbered } from "../testing.ts";

const NEVER: Record<string, string> = {
  "loopback": "127.0.0.1",
  "another loopback address": "127.8.8.8",
  "IPv6 loopback": "::1",
  "multicast": "224.0.0.251",
  "multicast within a site": "239.255.255.250",
  "IPv6 multicast": "ff02::1",
  "IPv6 multicast within a site": "ff05::2",
  "broadcast": "255.255.255.255",
  "no address": "0.0.0.0",
  "no IPv6 address": "::",
  "the link": "169.254.7.7",
  "the IPv6 link": "fe80::7",
  "IPv4-mapped loopback in IPv6 of old": "::7f00:1",
};

/** Where somebody sends. */
type Hit = { at: number; to: Endpoint };

/** A village whose server is evil; `hits`: what alice sends. */
function scene(options: PlayerOptions = {}) {
  const keys = keysFrom(dice("aimed").bytes(32)), { watch } = watchAll(), hits: Hit[] = [];
  const world = createWorld({
    v6: true,
    server: { keys, maxPerAddress: 5_000 },
    watch(machine, now, effect) {
      watch(machine, now, effect);
      // By more sockets than one an attempt writes to a peer who has confirmed the session: such ones are apart.
      const isOpener = effect.kind === "send" && effect.socket !== 0 && !isStun(effect.data);
      if (machine === "alice" && effect.kind === "send" && !isOpener) hits.push({ at: now, to: effect.to });
    },
  });
  const control = evil(world, keys);
  const come = () => join(world, "alice", { nat: "EIM+APDF random", v6: "2001:db8:a0::1", ...options });
  return { world, control, hits, come };
}

/** All that a server can name: candidates of peers, where a client is seen, and its own other address. */
const LIES: Record<string, (control: Evil, named: (i: number) => Endpoint) => void> = {
  "as a peer's candidates": (control, named) => {
    const candidates = Array.from({ length: 16 }, (_, i) => named(i));
    control.onSend = (message) => [
      "peer" in message && typeof message.peer === "object"
        ? rewrite(message, () => ({ candidates })) as ControlBody
        : message,
    ];
  },
  "as one of a peer's candidates, the last one": (control, named) => {
    control.onSend = (message) => {
      if (!("peer" in message) || typeof message.peer !== "object") return [message];
      const candidates = [...message.peer.candidates, named(0)];
      return [rewrite(message, () => ({ candidates })) as ControlBody];
    };
  },
  "as a peer's candidates, and as our own address": (control, named) => {
    const candidates = Array.from({ length: 16 }, (_, i) => named(i));
    control.onSend = (message) => {
      if ("peer" in message && typeof message.peer === "object") {
        return [rewrite(message, () => ({ candidates })) as ControlBody];
      }
      return [seenAt(message, named(0))];
    };
  },
  "as our own address": (control, named) => control.onSend = (message) => [seenAt(message, named(0))],
  "as OTHER-ADDRESS": (control, named) => control.onStun = (_, from) => ({ mapped: from, other: named(0) }),
  "as our mapped address": (control, named) => control.onStun = () => ({ mapped: named(0) }),
  "as both in STUN": (control, named) => control.onStun = () => ({ mapped: named(1), other: named(0) }),
};

function seenAt(message: Control, where: Endpoint): ControlBody {
  return message.type === "WELCOME" || message.type === "ALIVE" ? { ...message, public: where } : message;
}

for (const [what, lie] of Object.entries(LIES)) {
  for (const nat of ["EIM+APDF random", "APDM+APDF random", "APDM+APDF sequential"]) {
    test(`an evil server names ${what} what is nobody's: nothing goes there (a peer behind ${nat})`, () => {
      const found = Object.entries(NEVER).filter(([, host]) => {
        const { world, control, hits, come } = scene();
        lie(control, (i) => formatEndpoint(host, 1_000 + i));
        const alice = come(), bob = join(world, "bob", { nat });
        login(world, alice, bob);
        world.net.run(5_000);
        alice.send("bob", "hi");
        world.net.run(5_000);
        bob.send("alice", "ho");
        world.net.run(20_000);
        return hits.some(({ to }) => ["none", "link", "loopback"].includes(scopeOf(hostOf(to))));
      });
      assert.deepEqual(found.map(([name]) => name), []);
    });
  }
}

for (const secondPort of [0, 1, 65_535]) {
  test(`an evil server says that its second port is ${secondPort}: whatever is sent goes to an endpoint`, () => {
    const { world, control, come } = scene(); // which watches what is sent
    control.onSend = (message) => [message.type === "WELCOME" ? { ...message, secondPort } : message];
    login(world, come());
    world.net.run(10_000);
  });
}

test("a server on this host may name this host: two of its clients here reach each other over loopback", () => {
  const { watch } = watchAll(), world = createWorld({ watch }), host = world.serverHost;
  const [alice, bob] = ["alice", "bob"].map((name) => join(world, name, { host, servers: ["127.0.0.1:2280"] }));
  login(world, alice!, bob!);
  alice!.send("bob", "hi");
  world.net.run(5_000);
  assert.deepEqual([alice!.path(), bob!.path()], ["lan", "lan"]);
});

// ---------------------------------------------------------------------------------------------------- strangers

/** Datagrams to strangers, in all: so many a second on average, and so many at first. */
const PER_SECOND = 30, BURST = 150;

/** Replays them through such a limit; how far they go beyond it. */
function excess(hits: Hit[]): { datagrams: number; beyond: number } {
  let level = 0, last = hits[0]?.at ?? 0, beyond = 0;
  for (const { at } of hits) {
    level = Math.max(0, level - (at - last) * PER_SECOND / 1_000) + 1;
    last = at;
    beyond = Math.max(beyond, level - BURST);
  }
  return { datagrams: hits.length, beyond };
}

/** Each time another stranger. */
function strangers() {
  let count = 0;
  return () => {
    count = (count + 1) % 60_000;
    return formatEndpoint(`198.${18 + (count >> 15)}.${count >> 7 & 255}.${1 + (count & 127)}`, 1_000 + count % 50_000);
  };
}
const isStranger = ({ to }: Hit) => /^198\.(18|19)\./.test(to);

type Scene = { world: World; control: Evil; next: () => Endpoint };
const sixteen = (next: () => Endpoint) => Array.from({ length: 16 }, next);

/** Everybody whom alice is introduced to is elsewhere. */
function aimIntroductions({ control, next }: Scene): void {
  control.onSend = (message, to) => [
    to === "alice" && "peer" in message && typeof message.peer === "object"
      ? rewrite(message, () => ({ candidates: sixteen(next) })) as ControlBody
      : message,
  ];
}

const MOVES: Record<string, (scene: Scene) => void> = {
  "one peer, introduced 20 times a second": (scene) => {
    const { world, control } = scene;
    let introduction: Control | undefined;
    aimIntroductions(scene);
    const { onSend } = control;
    control.onSend = (message, to) => {
      if (to === "alice" && message.type === "INTRODUCTION") introduction = message;
      return onSend(message, to);
    };
    world.net.run(2_000);
    for (let t = 0; t < 60_000; t += 50) {
      const again = introduction && rewrite(introduction, () => ({ candidates: sixteen(scene.next) }));
      if (again) control.tell("alice", again as ControlBody);
      world.net.run(50);
    }
  },
  "many peers that do not exist, who call": (scene) => {
    const { world } = scene;
    aimIntroductions(scene);
    const names = numbered(many(300, 100), "fake-");
    const rogues = crowdOf(world, names);
    for (let t = 0; t < 60_000; t += 100) {
      const each = rogues[t / 100 % rogues.length]!;
      each.open("alice", { type: "P2PTRASH", probe: 1 });
      world.net.run(100);
    }
  },
  "where we are seen changes ten times a second": ({ world, control, next }) => {
    control.onStun = () => ({ mapped: next(), other: next() });
    for (let t = 0; t < 60_000; t += 100) {
      control.tell("alice", like("ALIVE", { asked: 0, public: next() }));
      world.net.run(100);
    }
  },
};
MOVES["all of it"] = (scene) => {
  const { world, control, next } = scene;
  control.onStun = () => ({ mapped: next(), other: next() });
  aimIntroductions(scene);
  const rogues = crowdOf(world, numbered(many(300, 100), "fake-"));
  for (let t = 0; t < 60_000; t += 100) {
    rogues[t / 100 % rogues.length]!.open("alice", { type: "P2PTRASH", probe: 1 });
    control.tell("alice", like("ALIVE", { asked: 0, public: next() }));
    world.net.run(100);
  }
};

/** Clients of the evil server who know alice. */
function crowdOf(world: World, names: string[]): Rogue[] {
  return rogueCrowd(world, names, { name: "alice" } as never);
}

for (const [what, move] of Object.entries(MOVES)) {
  test(`an evil server aims a client at strangers, ${what}: 30 datagrams a second in all, after 150`, LONG, () => {
    const { world, control, hits, come } = scene();
    const alice = come(), bob = join(world, "bob", { direct: false });
    login(world, alice, bob);
    world.net.run(5_000);
    alice.send("bob", "hi");
    move({ world, control, next: strangers() });
    world.net.run(10_000);
    const { datagrams, beyond } = excess(hits.filter(isStranger));
    console.log(`${what}: ${datagrams} datagrams to strangers in about 70 s`);
    assert.ok(datagrams > 0, "this shows nothing");
    assert.ok(beyond <= 5, `${datagrams} datagrams, at worst ${Math.round(beyond)} beyond the limit`);
  });
}
