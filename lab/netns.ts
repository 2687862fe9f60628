/**
 * The real programs through real NATs: `server.ts` and `client.ts` as processes of Deno and Bun, each way round, in
 * network namespaces of Linux whose routers are the kernel's own connection tracking.
 *
 *     server 192.0.2.1, .2 ---- core ~~~~ router 203.0.113.2  ---- 192.168.1.2 alice
 *                                 |~~~~~~ router 203.0.113.18 ---- 192.168.2.2 bob
 *                        drops TTL < 10, loses N %       (or no router, or two in a row)
 *
 * `~~~~` takes 20 ms each way: R (client, server) is 40 ms, D (peer, peer) is 80 ms. Every case has an internet of
 * its own; the namespace that this file is started in gets no interface, no address, no rule and no setting.
 *
 *     deno run -A --unstable-net lab/netns.ts [FILTER]      or      bun lab/netns.ts [FILTER]
 *
 * @module
 */
import { spawn, spawnSync } from "node:child_process";
import dgram from "node:dgram";
import { existsSync, readFileSync } from "node:fs";
import process from "node:process";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

/** One way through the wire between a site and the core: as in our measurements of other systems. */
const WIRE_MS = 20;
/** What may wait to enter the wires: in a spray 256 sockets speak up at once. */
const WIRE_BYTES = 2 ** 22;
/** With fewer hops to live than this, after the core's own, a packet ends there: real paths are longer than ours. */
const CORE_TTL = 10;
/** R, client and server there and back, and D, the same between the peers; a message over the server takes one R. */
const R_MS = 2 * WIRE_MS, D_MS = 4 * WIRE_MS;
/** In calm, and on top of them what two processors full of other cases add; see `assertInTime` for a busy machine. */
const BUSY_MS = 100;
const MESSAGE_MS = 1.15 * R_MS + BUSY_MS, PUNCH_MS = 1.3 * (R_MS + D_MS) + BUSY_MS, SPRAY_MS = 14_000;
/** Cases at the same time. They mostly wait, but a runtime that starts needs a processor for 100 ms. */
const CONCURRENT = 3;
/** For everything that must happen but has no limit of its own. */
const PATIENCE_MS = 40_000;
/** A case that is late is played again: so many times in all, and the best one counts. */
const ATTEMPTS = 3;

const PREFIX = `punch-${process.pid}-`;
const SELF = fileURLToPath(import.meta.url);
const ROOT = `${import.meta.dirname}/..`;
const ENVIRONMENT = { ...process.env, DENO_NO_UPDATE_CHECK: "1" };

const sleep = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));
const ms = (n: number) => `${n.toFixed(0)} ms`;

function assert(fact: boolean, complaint: string): asserts fact {
  if (!fact) throw new Error(complaint);
}

/** All happened, but not in time. What is not the product's fault does not happen every time. */
class Late extends Error {}

/** When timers of ours came that had as long to wait as a packet in a wire, and how late. */
const timers: { at: number; lateMs: number }[] = [];
const RECENT_MS = 10_000;

function watchTimers(): void {
  const due = performance.now() + WIRE_MS;
  setTimeout(() => {
    const at = performance.now();
    timers.push({ at, lateMs: at - due });
    while (timers[0]!.at < at - RECENT_MS) timers.shift();
    watchTimers();
  }, WIRE_MS);
}

/** The limit grows as bare timers of the same run have just grown, since all that is measured is made of such waits. */
function assertInTime(afterMs: number, limitMs: number, story: string): void {
  const slowness = 1 + Math.max(0, ...timers.map(({ lateMs }) => lateMs)) / WIRE_MS, limit = limitMs * slowness;
  if (afterMs > limit) throw new Late(`${story}: ${ms(afterMs)} is over the limit of ${ms(limit)}`);
}

// ------------------------------------------------------------------------------------------------------ NATs

interface Rules {
  input?: "drop" | "accept" | "reject"; // what becomes of a packet to the router itself that belongs to no flow
  source?: string;
  destination?: string;
  outgoing?: string;
}

/**
 * Linux maps and filters per flow, and keeps the source port if it can: plain masquerade is EIM as long as nobody
 * else has the port, with APDF. INPUT matters because a packet that belongs to no flow is a packet to the router:
 * accepted, it becomes a flow that occupies the very port our punch wants, and the punch leaves from another one;
 * dropped or rejected, it is never confirmed and leaves no trace.
 *
 * `to :10000-29999` gives a source's first flow a random port and its next flows the same, because the kernel looks
 * for a flow of that source first (`find_appropriate_src`): EIM with ports that nobody can guess and that change
 * when the router forgets. The range must not touch that of ephemeral ports (32768-60999), or they would be kept.
 * `random,fully-random` skips that look: APDM. With other ranges for other addresses the look is in vain: ADM.
 *
 * Other filters do not exist in the kernel. A map of who sent from where, by which we translate what comes in, makes
 * them; it holds ports of the inside, which are those of the outside too, as masquerade keeps them. What comes from
 * the inside for our own address can be translated by it as well, and then has to get our address: a hairpin.
 */
const NATS = {
  "masquerade": {},
  "input-accept": { input: "accept" },
  "input-reject": { input: "reject" },
  "eim-random": { source: "meta l4proto udp masquerade to :10000-29999" },
  "fully-random": { source: "masquerade random,fully-random" },
  "adm-random": {
    source: `ip daddr 192.0.2.1 meta l4proto udp masquerade to :1024-9999
      oifname wan ip daddr 192.0.2.2 meta l4proto udp masquerade to :10000-19999
      oifname wan meta l4proto udp masquerade to :20000-29999`,
  },
  "full-cone": {
    outgoing: "update @opened { udp sport : ip saddr }",
    destination: "dnat to udp dport map @opened",
  },
  "address-restricted": {
    outgoing: "update @contacted { ip daddr . udp sport : ip saddr }",
    destination: "dnat to ip saddr . udp dport map @contacted",
  },
  "hairpin": {
    outgoing: "update @opened { udp sport : ip saddr }",
    destination: `dnat to udp dport map @opened
      iifname lan ip daddr 203.0.113.2 dnat to udp dport map @opened`,
    source: `masquerade
      oifname lan ip saddr 192.168.1.0/24 snat to 203.0.113.2`,
  },
} satisfies Record<string, Rules>;

type Nat = keyof typeof NATS;

/**
 * All rules of a router, as one transaction. `zone` is how it forgets: deleting the rules does not end the flows that
 * they made, and no rule can, but a flow is invisible from another zone of connection tracking. So a new number
 * forgets every mapping between one packet and the next, for every kind of NAT, with no interface going down.
 */
function routerRules(nat: Nat, zone: number): string {
  const { input = "drop", source = "masquerade", destination = "", outgoing = "" }: Rules = NATS[nat];
  return `flush ruleset
    table ip lab {
      map opened { type inet_service : ipv4_addr; flags dynamic,timeout; timeout 60s; size 65535; }
      map contacted { type ipv4_addr . inet_service : ipv4_addr; flags dynamic,timeout; timeout 60s; size 65535; }
      chain passing { type filter hook prerouting priority raw; ct zone set ${zone}; }
      chain own { type filter hook output priority raw; ct zone set ${zone}; }
      chain input { type filter hook input priority 0; ct state established,related accept; iifname wan ${input}; }
      chain forward {
        type filter hook forward priority 0
        iifname lan ${outgoing}
        iifname wan ct status dnat accept
        iifname wan ct state new,invalid drop
      }
      chain destination { type nat hook prerouting priority dstnat; iifname wan ${destination}; }
      chain source { type nat hook postrouting priority srcnat; oifname wan ${source}; }
    }
    table ip6 lab {
      chain forward { type filter hook forward priority 0; iifname wan ct state new,invalid drop; }
    }`;
}

function coreRules(lossPercent: number): string {
  return ["ip ttl", "ip6 hoplimit"].map((ttl) => `
    table ${ttl.split(" ")[0]} lab {
      chain forward {
        type filter hook forward priority 0; ${ttl} < ${CORE_TTL} drop
        ${lossPercent ? `numgen random mod 100 < ${lossPercent} drop` : ""}
      }
    }`).join("");
}

// ---------------------------------------------------------------------------------------------- the internet

/** Users behind routers, named from outside in; without a router, one user with a public address. */
interface Site {
  nats: Nat[];
  users: string[];
  isolated?: boolean; // they reach the router, but not each other, as in many a wireless network for guests
}

interface Weather {
  sites: Site[];
  lossPercent?: number;
  /** IPv6 everywhere: routers do not translate it, but let nothing in that was not asked for. */
  ipv6?: boolean;
}

interface Internet {
  namespace(name: string): string; // the namespace of a user or of the `server`
  forget(): Promise<void>; // every router forgets every mapping
  close(): Promise<void>;
}

function shell(script: string): Promise<void> {
  return new Promise((resolve, reject) => {
    const child = spawn("sh", ["-e"], { stdio: ["pipe", "ignore", "pipe"] });
    let complaint = "";
    child.stderr.on("data", (text) => complaint += text);
    child.on("close", (code) => code ? reject(new Error(`A script of the lab: ${complaint}`)) : resolve());
    child.stdin.end(script);
  });
}

const load = (name: string, rules: string) => `ip netns exec ${name} nft -f - <<'END'\n${rules}\nEND`;

/** Builds the network namespaces of one case; their names begin with `prefix`. */
async function internet(prefix: string, { sites, lossPercent = 0, ipv6 }: Weather): Promise<Internet> {
  const script: string[] = [];
  const names: string[] = [];
  const routers: [string, Nat][] = [];
  const namespace = (name: string) => prefix + name;
  const ip = (name: string, command: string) => script.push(`ip -n ${prefix}${name} ${command}`);

  const create = (name: string, isRouter = true) => {
    names.push(name);
    script.push(`ip netns add ${prefix}${name}`);
    ip(name, "link set lo up");
    // Duplicate address detection would keep IPv6 addresses unusable for a second or two; with bridge-nf-call a
    // bridge shows its frames to the router's rules, though two hosts on one LAN are none of its business.
    const settings = ["net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"];
    if (isRouter) settings.push("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1");
    if (existsSync("/proc/sys/net/bridge")) settings.push("net.bridge.bridge-nf-call-iptables=0");
    script.push(`ip netns exec ${prefix}${name} sysctl -qw ${settings.join(" ")}`);
  };
  /** Gives an interface its addresses and the default routes through it; of each, IPv4 comes first. */
  const up = (name: string, device: string, addresses: string[], gateways: string[] = []) => {
    const families = ipv6 ? 2 : 1;
    addresses.slice(0, families).forEach((a) => ip(name, `addr add ${a} dev ${device}`));
    ip(name, `link set ${device} up`);
    gateways.slice(0, families).forEach((g) => ip(name, `route add default via ${g}`));
  };

  create("core");
  create("server", false);
  ip("core", `link add server type veth peer name eth0 netns ${prefix}server`);
  up("core", "server", ["192.0.2.254/24", "2001:db8::fe/64"]);
  up("server", "eth0", ["192.0.2.1/24", "2001:db8::1/64"], ["192.0.2.254", "2001:db8::fe"]);
  ip("server", "addr add 192.0.2.2/24 dev eth0");
  script.push(load(prefix + "core", coreRules(lossPercent)));

  sites.forEach(({ nats, users, isolated }, i) => {
    const [first, device] = nats.length ? [`router${i}.0`, "wan"] : [users[0]!, "eth0"];
    const [near4, far4] = [`203.0.113.${16 * i + 1}`, `203.0.113.${16 * i + 2}`];
    const [near6, far6, lan6] = [`2001:db8:f${i}::1`, `2001:db8:f${i}::2`, `2001:db8:${i + 1}::`];
    create(first, nats.length > 0);
    script.push(...wire([prefix + "core", `site${i}`], [prefix + first, device]));
    up("core", `site${i}`, [`${near4}/28`, `${near6}/64`]);
    up(first, device, [`${far4}/28`, `${far6}/64`], [near4, near6]);
    if (ipv6) ip("core", `route add ${lan6}/64 via ${far6}`);

    nats.forEach((nat, depth) => {
      const self = `router${i}.${depth}`;
      const last = depth === nats.length - 1;
      const lan4 = last ? `192.168.${i + 1}.` : `100.64.${i}.`;
      routers.push([prefix + self, nat]);
      ip(self, "link add lan type bridge");
      up(self, "lan", [`${lan4}1/24`, `${lan6}1/64`]);
      (last ? users : [`router${i}.${depth + 1}`]).forEach((inside, n) => {
        // A client leaves out veth*, br-* and docker*: what a user sees is called eth0.
        const device = last ? "eth0" : "wan";
        create(inside, !last);
        ip(self, `link add port${n} type veth peer name ${device} netns ${prefix}${inside}`);
        ip(self, `link set port${n} master lan up`);
        if (isolated) ip(self, `link set port${n} type bridge_slave isolated on`);
        up(inside, device, [`${lan4}${n + 2}/24`, `${lan6}${n + 2}/64`], [`${lan4}1`, `${lan6}1`]);
      });
    });
  });

  let zone = 0;
  const forget = () => {
    zone++;
    return shell(routers.map(([name, nat]) => load(name, routerRules(nat, zone))).join("\n"));
  };
  await shell(script.join("\n"));
  await forget();
  return { namespace, forget, close: () => shell(names.map((n) => `ip netns del ${prefix}${n}`).join("\n")) };
}

// ----------------------------------------------------------------------------------------------------- wires

let wires = 0;

/**
 * A wire that takes time, on kernels without netem: a VXLAN tunnel whose packets pass through a process of ours. A
 * VXLAN device goes on sending from the namespace in which it was made, wherever it is moved; so both ends are made
 * in one. The low bit of the network identifier says which end it is, the others which wire.
 */
function wire(...ends: [namespace: string, device: string][]): string[] {
  const id = ++wires * 2;
  const remote = "local 10.0.0.1 remote 10.0.0.2 dstport 4789";
  return ends.flatMap(([namespace, device], end) => [
    `ip -n ${PREFIX}wires link add x${id + end} type vxlan id ${id + end} ${remote}`,
    `ip -n ${PREFIX}wires link set x${id + end} netns ${namespace} name ${device}`,
  ]);
}

/** Makes the two namespaces that all wires lead through, and starts this file again in the second one. */
async function startWires(runtime: Runtime): Promise<void> {
  await shell(`
    ip netns add ${PREFIX}wires; ip netns add ${PREFIX}delay
    ip -n ${PREFIX}wires link add u mtu 1600 type veth peer name u mtu 1600 netns ${PREFIX}delay
    ip -n ${PREFIX}wires addr add 10.0.0.1/24 dev u; ip -n ${PREFIX}wires link set u up
    ip -n ${PREFIX}delay addr add 10.0.0.2/24 dev u; ip -n ${PREFIX}delay link set u up`);
  const child = spawn("ip", ["netns", "exec", `${PREFIX}delay`, ...COMMANDS[runtime], SELF, "--delay"], {
    env: ENVIRONMENT,
    stdio: ["pipe", "pipe", "inherit"],
  });
  owned.add(child.pid!);
  await new Promise((ready, failed) => {
    child.stdout.once("data", ready);
    child.once("exit", () => failed(new Error("The process that delays packets has ended")));
  });
}

/** That process: what comes out of one end of a wire goes into the other a little later. It ends with its parent. */
function delay(): void {
  const socket = dgram.createSocket("udp4");
  socket.on("message", (packet) => {
    packet.writeUIntBE(packet.readUIntBE(4, 3) ^ 1, 4, 3);
    completeChecksum(packet);
    setTimeout(() => socket.send(packet, 4789, "10.0.0.1"), WIRE_MS);
  });
  // While no wire exists, nobody listens on the other side, and Bun reports that as an error.
  socket.on("error", () => {});
  socket.bind(4789, "10.0.0.2", () => {
    socket.setRecvBufferSize(WIRE_BYTES); // only Bun heeds it
    console.log("ready");
  });
  process.stdin.resume().on("end", () => process.exit());
}

/**
 * Virtual interfaces leave the UDP checksum to a hardware that is not there: what we are given has the sum of the
 * addresses alone in that field, and would be dropped as corrupt once it came back. In both families the addresses
 * stand just before the UDP header, at 8 bytes of VXLAN, 14 of Ethernet and 20 or 40 of IP.
 */
function completeChecksum(packet: Uint8Array): void {
  const view = new DataView(packet.buffer, packet.byteOffset, packet.byteLength);
  const type = view.getUint16(20);
  const [protocol, addresses, udp] = type === 0x86dd ? [28, 30, 62] : [31, 34, 42];
  if (type !== 0x86dd && type !== 0x0800 || view.getUint8(protocol) !== 17) return;
  const end = udp + view.getUint16(udp + 4);
  view.setUint16(udp + 6, 0);
  let sum = 17 + end - udp;
  for (let i = addresses; i < end; i += 2) sum += i + 1 < end ? view.getUint16(i) : view.getUint8(i) << 8;
  while (sum > 0xffff) sum = (sum & 0xffff) + (sum >>> 16);
  view.setUint16(udp + 6, ~sum & 0xffff || 0xffff);
}

// -------------------------------------------------------------------------------------------------- programs

/** A line of `--json`, and when it came. */
type Event = { event: string; at: number; [field: string]: unknown };
type Want = Record<string, string | number | boolean | RegExp>;

interface Program {
  events: Event[];
  type(line: string): number; // types a line; returns the time
  /** The first event, past or future but later than `after`, all of whose wanted fields are as wanted. */
  until(want: Want, options?: { after?: number }): Promise<Event>;
  kill(): Promise<void>;
  evidence(): string; // what to show when the case fails
}

const RUNTIMES = ["deno", "bun"] as const;
type Runtime = typeof RUNTIMES[number];
const COMMANDS: Record<Runtime, string[]> = { deno: ["deno", "run", "-A", "--unstable-net"], bun: ["bun"] };

/** Processes that must not outlive us. */
const owned = new Set<number>();

function start(name: string, { namespace, command }: { namespace: string; command: string[] }): Program {
  // With one namespace `ip netns exec` does not fork, so the process that we know is the program itself.
  const child = spawn("ip", ["netns", "exec", namespace, ...command], { cwd: ROOT, env: ENVIRONMENT });
  const pid = child.pid!;
  const began = performance.now();
  const events: Event[] = [];
  let complaints = "";
  let ended = "";
  owned.add(pid);
  const closed = new Promise<void>((resolve) =>
    child.on("close", (code, signal) => {
      owned.delete(pid);
      ended = `ended with ${signal ?? code}`;
      resolve();
    })
  );
  child.stdin.on("error", () => {/* until() says that the program has ended */});
  child.stderr.on("data", (text) => complaints += text);
  createInterface({ input: child.stdout }).on("line", (line) => {
    const at = performance.now();
    try {
      events.push({ ...JSON.parse(line), at });
    } catch {
      events.push({ event: "not JSON", line, at });
    }
  });
  return {
    events,
    type(line) {
      child.stdin.write(`${line}\n`);
      return performance.now();
    },
    async until(want, { after = 0 } = {}) {
      const wants = Object.entries(want);
      const fits = (v: Want[string], is: unknown) => v instanceof RegExp ? v.test(`${is}`) : v === is;
      for (const limit = performance.now() + PATIENCE_MS;; await sleep(2)) {
        const found = events.find((e) => e.at > after && wants.every(([k, v]) => fits(v, e[k])));
        if (found) return found;
        const text = wants.map(([field, value]) => `${field} ${value}`).join(", ");
        assert(!ended, `${name} ${ended} before ${text}`);
        assert(performance.now() < limit, `${name} has no ${text} after ${ms(PATIENCE_MS)}`);
      }
    },
    kill() {
      if (!ended) child.kill("SIGKILL");
      return closed;
    },
    evidence() {
      const telling = events.filter((e) => !e["ok"] && !`${e["text"]}`.startsWith("talk ")).slice(-16);
      const lines = telling.map(({ at, ...event }) => `\n    ${ms(at - began)} ${JSON.stringify(event)}`);
      return `${name}, ${command[0]} ${ended}${lines.join("")}\n    ${complaints.slice(-2000)}`;
    },
  };
}

// ----------------------------------------------------------------------------------------------------- cases

interface World {
  alice: Program;
  bob: Program;
  net: Internet;
  startServer(): Promise<void>;
  killServer(): Promise<void>;
}

interface Case extends Weather {
  name: string;
  /** With so many of the four pairs of runtimes; if two, then each of the users with each of the runtimes. */
  mixes?: 1 | 2 | 4;
  altHost?: boolean; // the server has a second address, and so can tell all kinds of NAT
  /** Another STUN server, Debian's coturn, at another address: the clients ask it as well, and can tell most kinds. */
  observer?: boolean;
  server?: string; // how the clients are told where the server is, if not by its IPv4 address
  play(world: World): Promise<string>; // throws where the product falls short; returns what is worth telling
}

/** Alice says hello; both report the wanted path in time; the next message of each takes it. */
const meet = (
  path: "direct" | "lan",
  { address = /./, messageMs = MESSAGE_MS, pathMs = PUNCH_MS } = {},
) =>
async ({ alice, bob }: World) => {
  const typed = alice.type("send bob hello");
  const [hello, a, b] = await Promise.all([
    bob.until({ event: "message", from: "alice", text: "hello" }),
    alice.until({ event: "path", peer: "bob", path, address }),
    bob.until({ event: "path", peer: "alice", path, address }),
  ]);
  alice.type("send bob again");
  bob.type("send alice back");
  await bob.until({ event: "message", text: "again", path });
  await alice.until({ event: "message", text: "back", path });
  await alice.until({ event: "sent", to: "bob", ok: true, path });
  const [messageAfter, pathAfter] = [hello.at - typed, Math.max(a.at, b.at) - typed];
  const story = `message after ${ms(messageAfter)}, ${path} after ${ms(pathAfter)}`;
  assertInTime(messageAfter, messageMs, story);
  assertInTime(pathAfter, pathMs, story);
  return story;
};

/**
 * Both say something `count` times. Throws unless everything arrives, once and in order; returns the longest time
 * that a message took from one's keyboard to the other's screen.
 */
async function talk({ alice, bob }: World, count: number, everyMs = 200): Promise<number> {
  const ways = [[alice, bob, "bob"], [bob, alice, "alice"]] as const;
  const typed: number[][] = [[], []];
  for (let i = 0; i < count; i++) {
    ways.forEach(([from, _, name], way) => typed[way]!.push(from.type(`send ${name} talk ${i}`)));
    await sleep(everyMs);
  }
  const last = { event: "message", text: `talk ${count - 1}` };
  await Promise.all(ways.map(([_, to]) => to.until(last)));
  return Math.max(...ways.flatMap(([_, to, name], way) => {
    const got = to.events.filter((e) => e.event === "message" && `${e["text"]}`.startsWith("talk "));
    const order = got.map((e) => `${e["text"]}`.slice(5)).join(" ");
    assert(order === [...typed[way]!.keys()].join(" "), `What ${name} was told arrived as ${order}`);
    return got.map((e, i) => e.at - typed[way]![i]!);
  }));
}

function withStall(stallMs: number, limitMs: number): string {
  const story = `nothing lost, stall ${ms(stallMs)}`;
  assertInTime(stallMs, limitMs, story);
  return story;
}

async function relayed(world: World): Promise<string> {
  const typed = world.alice.type("send bob hello");
  const hello = await world.bob.until({ event: "message", text: "hello", path: "relay" });
  const worst = await talk(world, 15);
  const all = [...world.alice.events, ...world.bob.events];
  assert(!all.some((e) => e["path"] === "direct"), "Two symmetric NATs, and yet a direct path");
  const story = `message after ${ms(hello.at - typed)}, 30 more in 3 s, worst ${ms(worst)}`;
  assertInTime(hello.at - typed, MESSAGE_MS, story);
  return story;
}

/** Both routers forget everything in the middle of a conversation, and then map to other ports. */
async function failover(world: World): Promise<string> {
  const { alice, bob, net } = world;
  const met = await direct(world);
  let after = Infinity;
  const forget = async () => {
    await sleep(1000);
    await net.forget();
    after = performance.now();
  };
  const [stall] = await Promise.all([talk(world, 30), forget()]);
  const told = withStall(stall, 2000);
  // Had the lab forgotten nothing, all this would pass as well: the server must have seen Bob's port change.
  const login = await bob.until({ event: "login" });
  alice.type("getu");
  const { users } = await alice.until({ event: "users" }, { after: performance.now() });
  assert(!JSON.stringify(users).includes(`"${login["public"]}"`), "Bob's router has not forgotten his port");
  const back = [alice, bob].map(({ events }) => {
    const later = events.filter((e) => e.at > after && e["path"]);
    return later[later.findLastIndex((e) => e["path"] !== "direct") + 1]?.at;
  });
  assert(!back.includes(undefined), "Still on the relay when 5 s had passed");
  return `${met}; ${told}, direct again ${ms(Math.max(...back.map(Number)) - after)} after the flush`;
}

/** The server is gone for a second in the middle of a conversation. */
const restart = (path: "direct" | "relay", stallMs: number) => async (world: World): Promise<string> => {
  if (path === "direct") await direct(world);
  const outage = async () => {
    await sleep(1000);
    await world.killServer();
    await sleep(1000);
    await world.startServer();
  };
  const [stall] = await Promise.all([talk(world, 25), outage()]);
  // Who talks over the relay has noticed; who talks directly need not until the next keepalive, in 20 s.
  if (path === "relay") {
    await Promise.all([world.alice, world.bob].map((p) => p.until({ event: "reconnected" })));
  }
  return withStall(stall, stallMs);
};

/** Typed faster than a round trip, so that a lost datagram shows in the times that the programs tell. */
async function hundred(world: World): Promise<string> {
  const met = await meet("direct", { messageMs: 2000, pathMs: 3000 })(world);
  await talk(world, 100, 50);
  const sent = [...world.alice.events, ...world.bob.events].filter((e) => e.event === "sent");
  const worst = Math.max(...sent.map((e) => Number(e["ms"])));
  return `${met}; 100 each way, worst acknowledged after ${ms(worst)}`;
}

const direct = meet("direct");
const spray = meet("direct", { pathMs: SPRAY_MS });
/** Alice behind the routers `a`, Bob behind the routers `b`. */
const apart = (a: Nat[], b = a): Site[] => [{ nats: a, users: ["alice"] }, { nats: b, users: ["bob"] }];
const together = (nat: Nat): Site[] => [{ nats: [nat], users: ["alice", "bob"] }];

const overIPv6 = meet("direct", { address: /^\[2001:db8:/ });
const [plain, symmetric] = [apart(["masquerade"]), apart(["fully-random"])];

/** Asks a program for its NAT. */
function isBehind(program: Program, what: Want): Promise<Event> {
  program.type("nat");
  return program.until({ event: "nat", ...what });
}

/** What a user is behind, and what `nat` finds it to be: mapping, filtering, allocation. */
interface Kind {
  nats: Nat[];
  is: [string, string, string | RegExp];
}

/** Four samples of random ports, of 10,000 here, are near each other now and then. */
const random = /^(random|block)$/;
const KINDS = {
  "public": { nats: [], is: ["EIM", "EIF", "preserving"] },
  "masquerade": { nats: ["masquerade"], is: ["EIM", "APDF", "preserving"] },
  "input-accept": { nats: ["input-accept"], is: ["EIM", "APDF", "preserving"] },
  "input-reject": { nats: ["input-reject"], is: ["EIM", "APDF", "preserving"] },
  "double NAT": { nats: ["masquerade", "masquerade"], is: ["EIM", "APDF", "preserving"] },
  "eim-random": { nats: ["eim-random"], is: ["EIM", "APDF", random] },
  "full-cone": { nats: ["full-cone"], is: ["EIM", "EIF", "preserving"] },
  "address-restricted": { nats: ["address-restricted"], is: ["EIM", "ADF", "preserving"] },
  "fully-random": { nats: ["fully-random"], is: ["APDM", "APDF", random] },
  "adm-random": { nats: ["adm-random"], is: ["ADM", "APDF", random] },
} satisfies Record<string, Kind>;
type KindName = keyof typeof KINDS;

/** Both learn what they are behind, of which a server with one address cannot tell all; then they meet. */
function pair([one, other]: [KindName, KindName], { altHost = false, observer = false } = {}): Case {
  const [a, b]: [Kind, Kind] = [KINDS[one], KINDS[other]];
  const symmetric = [a, b].filter(({ is }) => is[0] !== "EIM").length;
  const letsIn = [a, b].some(({ is }) => is[1] !== "APDF");
  // Nobody can tell ADM from EIM here, so that is tried after the plain punch and fresh sockets have failed.
  const isLate = !altHost && !observer && [a, b].some(({ is }) => is[0] === "ADM");
  const how = isLate
    ? meet("direct", { pathMs: 2 * SPRAY_MS })
    : symmetric === 2
    ? relayed
    : symmetric === 1 && !letsIn
    ? spray
    : direct;
  const learn = (program: Program, { nats, is: [mapping, filtering, allocation] }: Kind) =>
    isBehind(program, {
      mapping: altHost || observer || mapping === "APDM" || nats.length === 0 ? mapping : "unknown",
      filtering: altHost || filtering === "APDF" ? filtering : "unknown",
      allocation,
    });
  return {
    name: `${one} - ${other}${altHost ? ", --alt-host" : observer ? ", --stun" : ""}`,
    mixes: symmetric === 1 ? 2 : one === other && (symmetric === 2 || one === "masquerade") ? 4 : 1,
    altHost,
    observer,
    sites: apart(a.nats, b.nats),
    async play(world) {
      await Promise.all([learn(world.alice, a), learn(world.bob, b)]);
      return await how(world);
    },
  };
}

/** By the public address of a router that both are behind. */
async function hairpin(world: World): Promise<string> {
  await Promise.all([world.alice, world.bob].map((program) => isBehind(program, { hairpin: true })));
  return await meet("direct", { address: /^203\.0\.113\.2:/ })(world);
}

const names = (Object.keys(KINDS) as KindName[]).filter((name) => name !== "adm-random");
const CASES: Case[] = [
  ...names.flatMap((one, i) => names.slice(i).map((other, k) => pair(k % 2 ? [other, one] : [one, other]))),
  ...([
    ["public", "masquerade"],
    ["input-accept", "input-reject"],
    ["double NAT", "eim-random"],
    // Sprays, did not the peer know that all are let in.
    ["full-cone", "fully-random"],
    ["address-restricted", "fully-random"],
    ["masquerade", "adm-random"],
  ] satisfies [KindName, KindName][]).map((kinds) => pair(kinds, { altHost: true })),
  pair(["masquerade", "adm-random"]),
  pair(["masquerade", "adm-random"], { observer: true }),
  pair(["eim-random", "fully-random"], { observer: true }),
  // Before either knows its NAT.
  { name: "spray in haste", mixes: 2, sites: apart(["masquerade"], ["fully-random"]), play: spray },
  { name: "hairpin", sites: [{ nats: ["hairpin"], users: ["alice", "bob"], isolated: true }], play: hairpin },
  { name: "lan", mixes: 4, sites: together("masquerade"), play: meet("lan") },
  { name: "flush", mixes: 4, sites: apart(["eim-random"]), play: failover },
  { name: "restart, direct", mixes: 4, sites: plain, play: restart("direct", 1000) },
  { name: "restart, relay", mixes: 4, sites: symmetric, play: restart("relay", 6000) },
  { name: "IPv6", sites: symmetric, ipv6: true, server: "[2001:db8::1]:2280", play: overIPv6 },
  { name: "5 % loss", sites: plain, lossPercent: 5, play: hundred },
];

const OBSERVER = "192.0.2.2:3478";

const MIXES = RUNTIMES.flatMap((alice) => RUNTIMES.map((bob) => ({ alice, bob })));

/** A case, and who plays whom. */
type Cast = { row: Case } & Record<"alice" | "bob" | "server", Runtime>;

const title = ({ row, alice, bob, server }: Cast) => `${row.name} (${alice}-${bob}, server ${server})`;

/** Plays one case in an internet of its own; throws with the evidence if it fails. */
async function play(cast: Cast, prefix: string): Promise<string> {
  const programs: Program[] = [];
  const net = await internet(prefix, cast.row);
  const run = async (name: "server" | "alice" | "bob", args: string[]) => {
    const command = [...COMMANDS[cast[name]], ...args, "--json"];
    const program = start(name, { namespace: net.namespace(name), command });
    programs.push(program);
    await program.until({ event: name === "server" ? "listening" : "login" });
    return program;
  };
  const stun = cast.row.observer ? ["--stun", OBSERVER] : [];
  const client = (name: "alice" | "bob") => run(name, ["client.ts", cast.row.server ?? "192.0.2.1", name, ...stun]);
  try {
    let server: Program;
    const startServer = async () => {
      const hosts = cast.row.altHost ? ["--host", "192.0.2.1", "--alt-host", "192.0.2.2"] : [];
      server = await run("server", ["server.ts", "--port", "2280", ...hosts]);
    };
    await startServer();
    if (cast.row.observer) {
      const [address, port] = OBSERVER.split(":");
      const options = ["-n", "--stun-only", "--no-cli", "--log-file=stdout", `--listening-ip=${address}`];
      const command = ["turnserver", ...options, `--listening-port=${port}`, "--no-tcp", "--no-tls", "--no-dtls"];
      const coturn = start("coturn", { namespace: net.namespace("server"), command });
      programs.push(coturn);
      await coturn.until({ event: "not JSON", line: /admin thread/ }); // the last one that it starts
    }
    // Bob first, so that Alice finds him, and his key, in her list of users.
    const bob = await client("bob");
    const alice = await client("alice");
    return await cast.row.play({ alice, bob, net, startServer, killServer: () => server.kill() });
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    const evidence = [why, ...programs.map((program) => program.evidence())].join("\n  ");
    throw error instanceof Late ? new Late(evidence) : new Error(evidence);
  } finally {
    await Promise.all(programs.map((program) => program.kill()));
    await net.close();
  }
}

// ------------------------------------------------------------------------------------------------------ main

const run = (command: string, ...args: string[]) => spawnSync(command, args, { cwd: ROOT, env: ENVIRONMENT });

function kill(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch { /* it has ended */ }
}

/** Whether that process is a run of this file: its number alone may have gone to another program. */
function isRun(pid: number): boolean {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8").includes("netns.ts");
  } catch {
    return false;
  }
}

/** Ends our own programs, then deletes the namespaces of the runs that are gone and ends what runs in them. */
function sweep(isGone: (pid: number) => boolean): void {
  owned.forEach(kill);
  for (const [name, pid] of String(run("ip", "netns", "list").stdout).matchAll(/^punch-(\d+)-\S+/gm)) {
    if (!isGone(Number(pid))) continue;
    String(run("ip", "netns", "pids", name).stdout).split("\n").filter(Boolean).map(Number).forEach(kill);
    run("ip", "netns", "del", name);
  }
}

async function main(filter: string): Promise<number> {
  const works = (command: string, arg = "--version") => run(command, arg).status === 0;
  const present = RUNTIMES.filter((runtime) => works(runtime));
  const isRoot = process.platform === "linux" && process.getuid?.() === 0;
  if (!isRoot || !works("ip", "-V") || !works("nft") || present.length === 0) {
    console.log("skipped: needs root on Linux with ip and nft (apt-get install nftables), deno and bun on the PATH");
    return 0;
  }
  const end = (code: number, why?: unknown) => {
    if (why) console.error(why);
    sweep((pid) => pid === process.pid);
    process.exit(code);
  };
  for (const [signal, code] of [["SIGHUP", 129], ["SIGINT", 130], ["SIGTERM", 143]] as const) {
    process.on(signal, () => end(code));
  }
  process.on("uncaughtException", (error) => end(1, error));
  process.on("unhandledRejection", (error) => end(1, error));
  sweep((pid) => pid === process.pid || !isRun(pid));

  // No registry can be reached from the namespaces: what the programs import must be in the cache before.
  for (const [command, ...args] of present.map((runtime) => COMMANDS[runtime])) {
    run(command!, ...args, "client.ts", "--new-secret");
  }
  const queue = CASES.flatMap((row, i) => {
    const mixes = [0, 3, 1, 2].slice(0, row.mixes ?? 1).map((other) => MIXES[i % 4 ^ other]!);
    return mixes.map((mix, k): Cast => ({ row, ...mix, server: present[(i + k) % present.length]! }));
  }).filter((cast) => title(cast).includes(filter));
  if (queue.length === 0) {
    console.error(`No case matches "${filter}"`);
    return 2;
  }
  const count = { passed: 0, failed: 0, skipped: 0 };
  const late = new Map<Cast, number>();
  let number = 0;
  await startWires(present.at(-1)!);
  watchTimers();
  const worker = async () => {
    for (let cast = queue.shift(); cast; cast = queue.shift()) {
      const missing = [cast.alice, cast.bob, ...cast.row.observer ? ["turnserver"] : []].filter((one) => !works(one));
      if (missing.length > 0) {
        count.skipped++;
        console.log(`skipped ${title(cast)}: no ${missing.join(", ")} on the PATH`);
        continue;
      }
      const began = performance.now();
      try {
        const story = await play(cast, `${PREFIX}${++number}-`);
        count.passed++;
        console.log(`ok      ${title(cast)}: ${story} [${ms(performance.now() - began)}]`);
      } catch (error) {
        const attempts = (late.get(cast) ?? 0) + 1;
        if (error instanceof Late && attempts < ATTEMPTS) {
          late.set(cast, attempts);
          queue.push(cast);
          console.log(`late    ${title(cast)}, again: ${error.message.split("\n")[0]}`);
          continue;
        }
        count.failed++;
        console.log(`FAILED  ${title(cast)}: ${error instanceof Error ? error.message : error}`);
      }
    }
  };
  await Promise.all(Array.from({ length: CONCURRENT }, worker));
  sweep((pid) => pid === process.pid);
  const { passed, failed, skipped } = count;
  console.log(`${passed} passed, ${failed} failed${skipped ? `, ${skipped} skipped` : ""}`);
  return failed ? 1 : 0;
}

if (import.meta.main) {
  if (process.argv[2] === "--delay") delay();
  else process.exit(await main(process.argv[2] ?? ""));
}
