// The NATs of the simulated internet behave as RFC 4787 and the Linux kernel have it, one property a test.
import assert from "node:assert/strict";
import { test } from "node:test";
import type { Endpoint } from "../protocol.ts";
import { createNetwork, linux, type NatOptions, NATS } from "./network.ts";
import { A, A2, B, bytes, ear, heard, mirror, portOf, say, scene } from "./toys.ts";

// --------------------------------------------------------------------------------------- mapping and filtering

for (const [name, options] of Object.entries(NATS)) {
  test(`NATS["${name}"] maps, filters and allocates as it says`, () => {
    const { seenBy, comesIn, nat } = scene(options);
    const first = seenBy(A);
    // Nothing else was sent yet: from A the reply came in, from elsewhere what the filter admits.
    const { filtering, mapping } = options;
    const admitted = [comesIn(first, 0, 0), comesIn(first, 0, 1), comesIn(first, 1, 0)];
    assert.deepEqual(admitted, [true, filtering !== "APDF", filtering === "EIF"]);
    // The port that was probed above from A:2281 may be spoilt on a Linux with INPUT accept: use A:2282.
    const ports = [first, seenBy("198.51.100.1:2282"), seenBy(B), seenBy(A)].map(portOf);
    const same = [ports[1] === ports[0], ports[2] === ports[0] || options.linux === "accept", ports[3] === ports[0]];
    assert.deepEqual(same, [mapping !== "APDM", mapping === "EIM", true]);
    if (options.allocation === "preserving") assert.equal(ports[0], 40_000);
    else assert.notEqual(ports[0], 40_000);
    if (options.allocation === "sequential" && mapping === "APDM") assert.deepEqual(ports[2], ports[0]! + 2);
    if (typeof options.allocation === "object") assert.equal(new Set(nat.mappings().map(blockOf(options))).size, 1);
  });
}

const blockOf = ({ allocation }: NatOptions) => ({ outer }: { outer: Endpoint }) =>
  Math.floor((portOf(outer) - 1024) / (allocation as { block: number }).block);

test("two NATs open a path once both have sent, whatever their filters", () => {
  for (const filtering of ["EIF", "ADF", "APDF"]) {
    const { net, client, seenBy } = scene(NATS[`EIM+${filtering} random`]!);
    const other = net.nat({ ...NATS["EIM+APDF sequential"]!, name: "other", address: "203.0.113.6", delayMs: 10 });
    const peer = net.host({ name: "peer", addresses: ["10.0.0.2"], behind: other }).run(ear());
    const [mine, theirs] = [seenBy(A), seenBy(A, { process: peer })];
    client.events.length = peer.events.length = 0;
    say(client, theirs, { text: "one" }); // dies at the filter there
    net.run(100);
    assert.deepEqual(heard(peer), []);
    say(peer, mine, { text: "two" });
    net.run(100);
    assert.deepEqual(heard(client), ["two"]);
    say(client, theirs, { text: "three" });
    net.run(100);
    assert.deepEqual(heard(peer), ["three"]);
  }
});

test("packets to a port that nobody mapped, and from a LAN to a foreign LAN address, go nowhere", () => {
  const { net, client, comesIn, nat } = scene(NATS["EIM+EIF random"]!);
  const fates: string[] = [];
  net.trace = ({ node, fate }) => fates.push(`${node} ${fate}`);
  assert.equal(comesIn("203.0.113.5:40000"), false);
  assert.equal(fates.at(-1), "nat unmapped");
  say(client, "192.168.1.99:5");
  net.run(100);
  assert.equal(fates.at(-1), "core no-route");
  assert.equal(nat.mappings().length, 1);
});

test("a preserving NAT gives a port to one mapping: the first destination keeps it, the next ones do not", () => {
  const { net, client, seenBy } = scene(NATS["APDM+APDF preserving"]!);
  assert.equal(portOf(seenBy(A)), 40_000);
  assert.notEqual(portOf(seenBy(B)), 40_000);
  client.perform([{ kind: "open", socket: 1 }]);
  net.run(0);
  assert.equal(portOf(seenBy(B, { socket: 1 })), client.ports[1]);
});

test("a preserving NAT does not preserve what is outside its range", () => {
  const { nat, net, seenBy } = scene({ ...NATS["EIM+APDF preserving"]!, portRange: [10_000, 20_000] });
  for (const port of [9_999, 20_001]) {
    const host = net.host({ name: `${port}`, addresses: [`10.0.0.${port % 10}`], behind: nat });
    const seen = portOf(seenBy(A, { process: host.run(ear(), { ports: [port] }) }));
    assert.ok(seen >= 10_000 && seen <= 20_000);
  }
});

test("two hosts that use one port get two from a preserving NAT", () => {
  const { net, nat, seenBy } = scene(NATS["EIM+APDF preserving"]!);
  const rival = net.host({ name: "rival", addresses: ["192.168.1.11"], behind: nat }).run(ear(), { ports: [40_000] });
  assert.equal(portOf(seenBy(A)), 40_000);
  assert.notEqual(portOf(seenBy(B, { process: rival })), 40_000);
});

// ------------------------------------------------------------------------------------------------- allocation

/** The outside ports of so many fresh flows. */
function ports(options: Partial<NatOptions>, count: number, gapMs = 0) {
  const { net, client, seenBy } = scene({ ...NATS["APDM+APDF sequential"]!, ...options });
  return Array.from({ length: count }, (_, i) => {
    client.perform([{ kind: "open", socket: i + 1 }]);
    net.run(gapMs);
    return portOf(seenBy(A, { socket: i + 1 }));
  });
}

test("sequential allocation steps by `step`, wraps in the range and passes over taken ports", () => {
  for (const step of [1, 2, -1, -2]) {
    const seen = ports({ step }, 5);
    assert.deepEqual(seen, seen.map((_, i) => seen[0]! + i * step));
  }
  const wrapped = ports({ portRange: [5000, 5004] }, 5);
  assert.deepEqual([...wrapped].sort(), [5000, 5001, 5002, 5003, 5004]);
  const from = wrapped.indexOf(5004);
  if (from < 4) assert.equal(wrapped[from + 1], 5000);
  const taken = scene({ ...NATS["APDM+APDF sequential"]!, portRange: [5000, 5009] });
  const first = portOf(taken.seenBy(A));
  for (let i = 0; i < 9; i++) taken.seenBy(`198.51.100.2:${3000 + i}`); // the other nine
  taken.net.run(60_000);
  taken.seenBy(A); // the first alone survives the two minutes
  taken.net.run(90_000);
  assert.notEqual(portOf(taken.seenBy(A2)), first);
});

test("foreign flows move a sequential counter, by their rate", () => {
  const seen = ports({ foreignRate: 10 }, 100, 900); // 1 s between flows: our own and ten foreign ones
  const total = seen.slice(1).reduce((sum, port, i) => sum + ((port - seen[i]! + 64_512) % 64_512), 0);
  assert.ok(total > 99 * 9 && total < 99 * 13, `${total}`);
});

test("random allocation spreads over the range without collision", () => {
  const seen = ports({ allocation: "random", portRange: [10_000, 10_399] }, 400);
  assert.equal(new Set(seen).size, 400);
  assert.ok(Math.min(...seen) >= 10_000 && Math.max(...seen) <= 10_399);
  assert.notDeepEqual(seen, [...seen].sort());
  const wide = ports({ allocation: "random" }, 200).sort((a, b) => a - b);
  assert.ok(wide[20]! < 20_000 && wide[100]! > 20_000 && wide[100]! < 46_000 && wide[180]! > 46_000);
});

test("each subscriber has a block of its own, and those without one get nothing", () => {
  for (const options of [{ allocation: { block: 100 } }, { subscriberBlock: 100 }]) {
    const kind: NatOptions = { ...NATS["APDM+APDF sequential"]!, ...options, portRange: [20_000, 20_250] };
    const { net, nat, seenBy } = scene(kind);
    const blocks = [10, 11, 12].map((last) => {
      const address = `192.168.1.${last + 10}`;
      const process = net.host({ name: address, addresses: [address], behind: nat }).run(ear());
      return [1, 2, 3].map((i) => seenBy(`198.51.100.1:${2279 + i}`, { process })).map((endpoint) =>
        endpoint === "nothing" ? -1 : Math.floor((portOf(endpoint) - 20_000) / 100)
      );
    });
    assert.deepEqual(blocks.map((ports) => new Set(ports).size), [1, 1, 1]);
    assert.deepEqual(blocks.map(([block]) => block!).sort(), [-1, 0, 1]); // two blocks fit
  }
});

test("several public addresses are paired with inside addresses, or drawn for each mapping", () => {
  const hosts = (pooling: "paired" | "arbitrary") => {
    const net = createNetwork({ seed: 3 });
    const address = ["203.0.113.5", "203.0.113.6"];
    const nat = net.nat({ ...NATS["APDM+APDF random"]!, name: "nat", address, pooling });
    net.host({ name: "s", addresses: ["192.0.2.1"] }).run(ear(), { ports: [9] });
    return Array.from({ length: 20 }, (_, i) => {
      const process = net.host({ name: `${i}`, addresses: [`10.0.0.${i + 1}`], behind: nat }).run(ear());
      for (let port = 1; port < 20; port++) say(process, `192.0.2.1:${port}`);
      const mine = nat.mappings().filter(({ inner }) => inner?.startsWith(`10.0.0.${i + 1}:`));
      return new Set(mine.map(({ outer }) => outer.split(":")[0])).size;
    });
  };
  assert.deepEqual(new Set(hosts("paired")), new Set([1]));
  assert.deepEqual(new Set(hosts("arbitrary")), new Set([2]));
});

test("a full table and a used-up quota refuse new mappings until old ones expire", () => {
  for (const limit of [{ maxMappings: 2 }, { quota: 2 }]) {
    const { net, nat, seenBy } = scene({ ...NATS["APDM+APDF random"]!, ...limit });
    assert.notEqual(seenBy(A), "nothing");
    assert.notEqual(seenBy(A2), "nothing");
    assert.equal(seenBy(B), "nothing");
    const other = net.host({ name: "other", addresses: ["192.168.1.11"], behind: nat }).run(ear());
    assert.equal(seenBy(B, { process: other }) !== "nothing", "quota" in limit);
    net.run(120_000);
    assert.notEqual(seenBy(B), "nothing");
  }
});

// ------------------------------------------------------------------------------------------ lifetime and flush

test("a mapping lives for lifetimeMs after the last packet, and gets a new port after that", () => {
  const { net, seenBy, comesIn } = scene({ ...NATS["EIM+APDF random"]!, lifetimeMs: 60_000 });
  const first = seenBy(A); // passes the NAT now, its reply 40 ms later; 100 ms are over when this returns
  net.run(59_900);
  assert.equal(seenBy(A), first);
  net.run(60_000);
  assert.equal(comesIn(first), false);
  assert.notEqual(seenBy(A), first);
});

test("inbound packets keep a mapping alive, unless inboundRefresh is false", () => {
  for (const inboundRefresh of [true, false]) {
    const { net, seenBy, comesIn } = scene({ ...NATS["EIM+APDF random"]!, lifetimeMs: 60_000, inboundRefresh });
    const first = seenBy(A);
    for (let i = 0; i < 2; i++) net.run(40_000), comesIn(first);
    assert.equal(comesIn(first), inboundRefresh);
  }
});

test("a permission expires by itself, while another keeps the mapping alive", () => {
  const { net, seenBy, comesIn } = scene({ ...NATS["EIM+APDF random"]!, lifetimeMs: 60_000 });
  const first = seenBy(A);
  for (let i = 0; i < 3; i++) net.run(30_000), assert.equal(seenBy(B), first);
  assert.equal(comesIn(first, 0), false);
  assert.equal(comesIn(first, 1), true);
});

test("a permission that expired begins again as an unreplied one", () => {
  const { net, client, servers, seenBy, comesIn } = scene({ ...NATS["EIM+APDF random"]!, unrepliedMs: 30_000 });
  const first = seenBy(A);
  for (let i = 0; i < 5; i++) net.run(25_000), seenBy(B);
  servers[0]!.stop();
  say(client, A);
  net.run(30_000);
  net.inject({ from: A, to: first, data: bytes("late") });
  net.run(100);
  assert.equal(heard(client).includes("late"), false);
  assert.equal(comesIn(first, 1), true);
});

test("a flow that was never answered dies after unrepliedMs, an answered one after lifetimeMs", () => {
  const { net, client, seenBy, nat } = scene(linux("drop"));
  say(client, "198.51.100.1:9"); // no socket there
  net.run(29_999);
  assert.equal(nat.mappings().length, 1);
  net.run(1);
  assert.equal(nat.mappings().length, 0);
  seenBy(A);
  net.run(119_000);
  assert.equal(nat.mappings().length, 1);
  net.run(1000);
  assert.equal(nat.mappings().length, 0);
});

test("with an absolute lifetime a mapping dies at that age, whatever the traffic", () => {
  const { net, seenBy } = scene({ ...NATS["EIM+APDF random"]!, absoluteLifetimeMs: 60_000 });
  const seen = Array.from({ length: 13 }, () => (net.run(4_900), seenBy(A)));
  assert.equal(new Set(seen.slice(0, 12)).size, 1);
  assert.notEqual(seen[12], seen[0]);
});

test("flush() forgets everything: nothing comes in, and the next packet gets another port", () => {
  for (const allocation of ["sequential", "random", { block: 128 }] as const) {
    const { nat, seenBy, comesIn } = scene({ ...NATS["EIM+EIF random"]!, allocation });
    const first = seenBy(A);
    nat.flush();
    assert.deepEqual(nat.mappings(), []);
    assert.equal(comesIn(first), false);
    const next = seenBy(A);
    if (allocation === "sequential") assert.equal(portOf(next), portOf(first) + 1);
    else assert.notEqual(next, first);
    if (typeof allocation === "object") {
      const [before, after] = [first, next].map((outer) => blockOf(nat.options)({ outer }));
      assert.notEqual(before, after);
    }
  }
});

test("readdress() gives the NAT another public address, and the old one leads nowhere", () => {
  const { nat, seenBy, comesIn } = scene(NATS["EIM+EIF preserving"]!);
  const first = seenBy(A);
  nat.readdress("203.0.113.99");
  assert.equal(comesIn(first), false);
  assert.equal(comesIn("203.0.113.99:40000"), false);
  assert.equal(seenBy(A), "203.0.113.99:40000");
  assert.equal(comesIn("203.0.113.99:40000"), true);
});

// ------------------------------------------------------------------------------------- hairpin and carrier NAT

test("hairpin: a packet to the own NAT's public endpoint turns round there with the outside source, or is dropped", () => {
  for (const hairpin of [false, true, "external", "internal"] as const) {
    const { net, nat, seenBy } = scene({ ...NATS["EIM+EIF random"]!, hairpin });
    const peer = net.host({ name: "peer", addresses: ["192.168.1.11"], behind: nat }).run(ear(), { ports: [5] });
    const theirs = seenBy(A, { process: peer });
    const mine = seenBy(A);
    const sender = net.host({ name: "sender", addresses: ["192.168.1.12"], behind: nat }).run(ear(), { ports: [6] });
    const before = seenBy(A, { process: sender });
    const start = net.now();
    say(sender, theirs, { text: "round" });
    net.run(100);
    const note = peer.events.find(({ event }) => event.text === "round")?.event;
    assert.equal(note?.from, hairpin === false ? undefined : hairpin === "internal" ? "192.168.1.12:6" : before);
    if (note) assert.equal(note.at - start, 1);
    assert.notEqual(mine, theirs);
  }
});

test("hairpin obeys the filter: both must send", () => {
  const { net, nat, client, seenBy } = scene({ ...NATS["EIM+APDF random"]!, hairpin: true });
  const peer = net.host({ name: "peer", addresses: ["192.168.1.11"], behind: nat }).run(ear());
  const [mine, theirs] = [seenBy(A), seenBy(A, { process: peer })];
  for (const [from, to] of [[client, theirs], [peer, mine], [client, theirs]] as const) say(from, to), net.run(10);
  assert.deepEqual([client.received, peer.received], [2, 2]);
});

function carrier(options: NatOptions) {
  const net = createNetwork({ seed: 5 });
  const place = { name: "carrier", address: "203.0.113.5", delayMs: 10, lanDelayMs: 4 };
  const outer = net.nat({ ...options, ...place });
  const home = (i: number) => {
    const inner = net.nat({ ...linux("drop"), name: `home ${i}`, address: `100.64.0.${i}`, behind: outer, delayMs: 3 });
    return net.host({ name: `host ${i}`, addresses: ["192.168.1.2"], behind: inner }).run(ear(), { ports: [40_000] });
  };
  const server = net.host({ name: "server", addresses: ["198.51.100.1"], delayMs: 10 }).run(mirror(), {
    ports: [2280],
  });
  return { net, outer, one: home(1), two: home(2), server };
}

test("behind a carrier NAT both NATs translate, and both links count", () => {
  const { net, outer, one, server } = carrier(NATS.cgn!);
  const start = net.now();
  say(one, A);
  net.run(100);
  assert.equal(server.events[0]?.at, start + 3 + 10 + 10);
  assert.equal(one.events[0]?.at, start + 46);
  assert.equal(one.events[0]?.event.text, outer.mappings()[0]?.outer);
  assert.equal(outer.mappings()[0]?.inner, "100.64.0.1:40000");
});

test("two subscribers of a carrier meet at the carrier: by its inside addresses, and by hairpin", () => {
  const { net, one, two } = carrier(NATS.cgn!);
  for (const process of [one, two]) say(process, A);
  net.run(100);
  const [mine, theirs] = [one, two].map((process) => process.events[0]!.event.text);
  for (
    const [a, b, ms] of [["100.64.0.1:40000", "100.64.0.2:40000", 3 + 4 + 3], [mine!, theirs!, 3 + 8 + 3]] as const
  ) {
    say(one, b);
    net.run(100);
    const start = net.now();
    say(two, a, { text: "meet" });
    net.run(100);
    assert.deepEqual(one.events.at(-1)?.event, { socket: 0, from: b, text: "meet", at: start + ms });
  }
});

// ------------------------------------------------------------------------------------------- Linux's clash

test("Linux shares one outside port among flows, and only a taken 5-tuple costs the port", () => {
  const { net, nat, seenBy } = scene(linux("drop"));
  const rival = net.host({ name: "rival", addresses: ["192.168.1.11"], behind: nat }).run(ear(), { ports: [40_000] });
  assert.equal(portOf(seenBy(A)), 40_000);
  assert.equal(portOf(seenBy(B, { process: rival })), 40_000);
  assert.notEqual(portOf(seenBy(A, { process: rival })), 40_000);
});

for (const [input, clash] of [["accept", true], ["drop", false]] as const) {
  test(`Linux with INPUT ${input}: a packet that came first ${clash ? "moves" : "does not move"} the answer's port`, () => {
    const { net, nat, seenBy, comesIn } = scene(linux(input));
    assert.equal(comesIn("203.0.113.5:40000", 1), false); // the peer's punch comes too early
    assert.equal(nat.mappings().length, clash ? 1 : 0);
    assert.equal(portOf(seenBy(A)), 40_000); // another 5-tuple
    assert.equal(portOf(seenBy(B)) !== 40_000, clash);
    assert.equal(comesIn("203.0.113.5:40000", 1), !clash); // and his next punches die as well
    net.run(29_800);
    assert.equal(comesIn("203.0.113.5:40000", 1), !clash); // ... and keep the bad entry alive
    net.run(29_900);
    const own = nat.mappings().filter(({ inner }) => inner === null);
    assert.deepEqual(own.map(({ ageMs }) => ageMs > 60_000), clash ? [true] : []);
    net.run(200);
    assert.equal(nat.mappings().filter(({ inner }) => inner === null).length, 0);
    net.run(120_000);
    assert.equal(portOf(seenBy(B)), 40_000); // clean again after silence
  });
}

test("Linux with INPUT accept: whoever sends first keeps the port", () => {
  const { seenBy, comesIn } = scene(linux("accept"));
  assert.equal(portOf(seenBy(B)), 40_000);
  assert.equal(comesIn("203.0.113.5:40000", 1), true);
  assert.equal(portOf(seenBy(B)), 40_000);
});

// ---------------------------------------------------------------------------------------------- TTL and v6

test("a low TTL dies on the core, after it has made the own NAT's mapping; and it does not spoil the far one", () => {
  for (const [ttl, fate] of [[1, "nat ttl"], [2, "core ttl"], [5, "core ttl"], [13, "core ttl"], [64, "far passed"]]) {
    const { net, client, nat } = scene(NATS["EIM+APDF preserving"]!);
    const far = net.nat({ ...linux("accept"), name: "far", address: "203.0.113.6" });
    const peer = net.host({ name: "peer", addresses: ["10.0.0.2"], behind: far }).run(ear(), { ports: [7000] });
    say(peer, "203.0.113.5:40000");
    net.run(100);
    const fates: string[] = [];
    net.trace = ({ node, fate }) => fates.push(`${node} ${fate}`);
    say(client, "203.0.113.6:7000", { ttl: ttl as number });
    net.run(100);
    assert.ok(fates.includes(fate as string), `${ttl}: ${fates}`);
    assert.equal(nat.mappings().length, ttl === 1 ? 0 : 1);
    assert.equal(far.mappings().length, 1);
    assert.equal(peer.received, ttl === 64 ? 1 : 0);
  }
});

test("two carrier levels and a TTL of 8: the packet passes both own NATs, and no more", () => {
  const { net, outer, one, server } = carrier(NATS.cgn!);
  say(one, A, { ttl: 8 });
  net.run(100);
  assert.equal(outer.mappings().length, 1);
  assert.equal(server.received, 0);
});

test("IPv6 is not translated, but filtered by every NAT on the way", () => {
  const filters = ["none", "EIF", "ADF", "APDF"] as const;
  for (const [rank, v6Filter] of filters.entries()) {
    const net = createNetwork();
    const outer = net.nat({ ...NATS.cgn!, name: "carrier", address: "203.0.113.5", v6Filter: "none", delayMs: 5 });
    const options = { ...NATS["APDM+APDF random"]!, v6Filter };
    const nat = net.nat({ ...options, name: "home", address: "100.64.0.1", behind: outer });
    const addresses = ["192.168.1.2", "2001:db8:1::2"];
    const client = net.host({ name: "client", addresses, behind: nat }).run(ear(), { ports: [7] });
    const lan = net.host({ name: "lan", addresses: ["2001:db8:1::3"], behind: nat }).run(ear());
    const servers = [1, 2].map((i) =>
      net.host({ name: `s${i}`, addresses: [`2001:db8:${i}::1`], delayMs: 5 }).run(mirror(), { ports: [1, 2] })
    );
    const me = "[2001:db8:1::2]:7";
    say(lan, me); // never filtered
    say(servers[1]!, me); // before the client has said anything
    net.run(100);
    assert.deepEqual([lan.sent, client.received], [1, rank === 0 ? 2 : 1]);
    client.events.length = 0;
    say(client, "[2001:db8:1::1]:1");
    net.run(100);
    assert.deepEqual(heard(client), [me]);
    for (const [server, socket] of [[0, 0], [0, 1], [1, 0]] as const) say(servers[server]!, me, { socket });
    net.run(100);
    assert.equal(client.events.length - 1, [3, 3, 2, 1][rank]);
    assert.equal(nat.mappings().length, rank === 0 ? 0 : 1);
  }
});

test("IPv6 behind a Linux router: one host talks to two, whoever knocked before", () => {
  const net = createNetwork();
  const nat = net.nat({ ...linux("accept"), name: "nat", address: "203.0.113.5" });
  const client = net.host({ name: "client", addresses: ["2001:db8:1::2"], behind: nat }).run(ear(), { ports: [7] });
  const peers = [2, 3].map((i) =>
    net.host({ name: `${i}`, addresses: [`2001:db8:${i}::1`] }).run(ear(), { ports: [5] })
  );
  const meet = () => {
    for (const peer of peers) say(peer, "[2001:db8:1::2]:7");
    net.run(10);
  };
  meet();
  assert.deepEqual(nat.mappings(), []);
  for (const i of [2, 3]) say(client, `[2001:db8:${i}::1]:5`);
  net.run(1);
  for (let i = 0; i < 4; i++) net.run(20_000), meet();
  assert.equal(client.received, 8);
});

test("without an address of the destination's family nothing is sent", () => {
  const net = createNetwork();
  const fates: string[] = [];
  net.trace = ({ fate }) => fates.push(fate);
  const process = net.host({ name: "a", addresses: ["192.0.2.1"] }).run(ear());
  for (const to of ["[2001:db8::1]:5", "nonsense", "192.0.2.9:0"]) say(process, to);
  process.perform([{ kind: "send", socket: 0, to: "192.0.2.9:1", data: new Uint8Array(65_508) }]);
  const bound = net.host({ name: "b", addresses: ["192.0.2.2", "2001:db8::2"] });
  say(bound.run(ear(), { ports: [{ port: 5, address: "192.0.2.2" }] }), "[2001:db8::2]:5");
  say(bound.run(ear(), { ports: [{ port: 6, address: "192.0.2.77" }] }), "192.0.2.1:5"); // not an address of this host
  assert.deepEqual(fates, ["no-route", "no-route", "no-route", "too-long", "no-route", "no-route"]);
});
