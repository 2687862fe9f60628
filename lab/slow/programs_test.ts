/**
 * The command line on real processes: what scripts may rely on. Each case has a server of its own; several cases run at
 * a time, since most of the time they wait. They wait for events and never for a guessed time, so a busy machine slows
 * them down and nothing else. `deno test` starts the programs on Deno with the permissions of their tasks, `bun test`
 * on Bun.
 *
 * @module
 */
import assert from "node:assert/strict";
import dgram from "node:dgram";
import { readFileSync, statSync } from "node:fs";
import { networkInterfaces } from "node:os";
import { join } from "node:path";
import { encodeStunRequest, STUN_COOKIE } from "../../protocol.ts";
import { type Event, executable, OTHER, OWN, type Program } from "../programs.ts";
import { of, scenario } from "../stage.ts";

const MAX_MESSAGE_BYTES = 65_536;

const names = (users: Event) => (users["users"] as { name: string }[]).map(({ name }) => name);

/** Somebody else's socket. */
async function strange(host = "127.0.0.1"): Promise<dgram.Socket> {
  const socket = dgram.createSocket(host.includes(":") ? "udp6" : "udp4");
  await new Promise<void>((resolve) => socket.bind(0, host, resolve));
  return socket;
}

/** Asks the way STUN does until a server answers: for one that tells nobody when it listens. */
async function answersAt(port: number): Promise<void> {
  const socket = await strange(), request = encodeStunRequest({ transaction: STUN_COOKIE + "00".repeat(12) });
  const timer = setInterval(() => socket.send(request, port, "127.0.0.1"), 50);
  await new Promise((resolve) => socket.once("message", resolve));
  clearInterval(timer);
  socket.close();
}

/** They meet, and talk directly in both directions. */
async function converse(alice: Program, bob: Program): Promise<void> {
  alice.type(`send ${bob.name} first`);
  const first = await bob.until({ event: "message", from: alice.name, text: "first" });
  const sent = await alice.until({ event: "sent", to: bob.name, ok: true });
  assert.equal(first["id"], sent["id"], "the id is the same on both sides");
  for (const [one, other] of [[alice, bob], [bob, alice]] as const) {
    await one.until({ event: "path", peer: other.name, path: "lan" });
  }
  for (const [one, other] of [[alice, bob], [bob, alice]] as const) {
    const from = one.events.length;
    one.type(`send ${other.name} second`);
    await other.until({ event: "message", from: one.name, text: "second", path: "lan" });
    await one.until({ event: "sent", to: other.name, ok: true, path: "lan" }, { from });
  }
}

// ---------------------------------------------------------------------------------------------------- slow ones first

scenario("client ends with 1 after 10 s in which nobody answers", async ({ script }) => {
  const silent = await strange();
  const began = performance.now();
  const alice = await script(`127.0.0.1:${silent.address().port}`, "alice", ["send bob hi"], { code: 1 });
  const ms = performance.now() - began; // how much later than 10 s is the machine's affair, see recovery_test.ts
  silent.close();
  assert.ok(ms > 9_500, `after ${ms} ms`);
  assert.deepEqual(alice.events.map(({ event, code }) => `${event} ${code}`), ["error unreachable"]);
});

scenario("--secret-file: another secret reads nothing", async ({ server, client, file }) => {
  const { at } = await server();
  const alice = await client(at, "alice", ["--secret-file", file("one", "correct horse battery staple")]);
  const bob = await client(at, "bob", ["--secret-file", file("other", "wrong horse battery staple")]);
  const carol = await client(at, "carol");
  for (const [i, peer] of ["bob", "carol"].entries()) {
    alice.type(`send ${peer} for your eyes only`);
    const { reason } = await alice.until({ event: "sent", to: peer, ok: false }, { from: i });
    assert.ok(reason === "untrusted" || reason === "timeout", `reason ${reason}`);
  }
  assert.deepEqual([...of(bob, "message"), ...of(carol, "message")], []);
  alice.pipe();
  assert.equal(await alice.ended, 1);
});

scenario("a stranger's call with another secret ends nobody's `send`, and is no failure of his", async (stage) => {
  const { server, client, start, file } = stage;
  const { at } = await server();
  const bob = await client(at, "bob");
  const mallory = await client(at, "mallory", ["--secret-file", file("other", "wrong horse battery staple")]);
  bob.signal("SIGSTOP");
  const alice = start("client", [at, "alice", "--json"], { name: "alice" });
  alice.pipe("send bob important", "send bob as well");
  await alice.until({ event: "login" });
  mallory.type("send alice hi");
  await alice.until({ event: "error", code: "untrusted", notice: true });
  bob.signal("SIGCONT");
  assert.equal(await alice.ended, 0, alice.evidence());
  assert.deepEqual(of(alice, "sent").map(({ ok }) => ok), [true, true]);
  assert.deepEqual(of(bob, "message").map(({ text }) => text), ["important", "as well"]);
});

scenario("a piped line ends at LF or CRLF and nowhere else, whatever is in it", async ({ server, script }) => {
  const { at } = await server();
  const texts = ["a\u2028getu", "b\rgetu", "\ufeffc", "d\u0085getu", "e\vgetu"];
  const me = await script(at, "me", [...texts.map((text) => `send me ${text}`), "send me crlf\r"]);
  assert.deepEqual(of(me, "message").map(({ text }) => text), [...texts, "crlf"]);
  assert.equal(of(me, "users").length, 1, "the one at login");
});

scenario("server: a clean end, a new start in its place, and everybody is back with the same name", async (stage) => {
  const server = await stage.server();
  const alice = await stage.client(server.at, "alice"), bob = await stage.client(server.at, "bob");
  await converse(alice, bob);
  server.signal("SIGTERM");
  assert.equal(await server.ended, 0, server.evidence());
  await Promise.all([alice, bob].map((client) => client.until({ event: "reconnecting", name: client.name })));
  alice.type("send bob without a server");
  await bob.until({ event: "message", text: "without a server", path: "lan" });
  await stage.server(["--port", String(server.port), "--alt-port", "0"]);
  await Promise.all([alice, bob].map((client) => client.until({ event: "reconnected", name: client.name })));
  const from = alice.events.length;
  alice.pipe("getu", "send bob here again");
  const users = await alice.until({ event: "users" }, { from });
  assert.deepEqual(names(users), ["alice", "bob"]);
  await bob.until({ event: "message", text: "here again" });
  assert.equal(await alice.ended, 0, alice.evidence());
});

scenario("client goes on receiving while a `send` waits, and carries out the next line after it", async (stage) => {
  const { at } = await stage.server();
  const alice = await stage.client(at, "alice", ["--trace"]), bob = await stage.client(at, "bob");
  const carol = await stage.client(at, "carol");
  carol.signal("SIGSTOP");
  alice.pipe("send carol are you there?", "send bob after carol");
  await alice.says(/P2PTRANS/);
  bob.type("send alice meanwhile");
  await alice.until({ event: "message", from: "bob", text: "meanwhile" });
  assert.deepEqual([...of(alice, "sent"), ...of(bob, "message")], [], "the next line waits for the first");
  carol.signal("SIGCONT");
  assert.equal(await alice.ended, 0, alice.evidence());
  assert.deepEqual(of(alice, "sent").map(({ to }) => to), ["carol", "bob"]);
});

// ---------------------------------------------------------------------------------------------------- usage

scenario("usage errors end with 2, and say on stderr what is wrong", async ({ start }) => {
  const wrong: ["server" | "client", string[], RegExp][] = [
    ["client", [], /server/],
    ["client", ["127.0.0.1"], /name/],
    ["client", ["127.0.0.1", "alice", "--frobnicate"], /--frobnicate/],
    ["client", ["127.0.0.1", "alice", "--port", "70000"], /70000/],
    ["client", ["127.0.0.1", "alice", "--port", "many"], /many/],
    ["client", ["127.0.0.1", "alice", "--port="], /port/],
    ["client", ["127.0.0.1", "alice", "bob"], /bob/],
    ["client", ["127.0.0.1:99999", "alice"], /99999/],
    ["client", ["127.0.0.1:", "alice"], /127/],
    ["client", ["", "alice"], /server/i],
    ["client", ["127.0.0.1", ""], /name/],
    ["client", ["127.0.0.1", "two words"], /two words/],
    ["client", ["127.0.0.1", "n".repeat(33)], /nnn/],
    ["server", ["--frobnicate"], /--frobnicate/],
    ["server", ["here"], /here/],
    ["server", ["--port", "65536"], /65536/],
    ["server", ["--port", "-1"], /-1/],
    ["server", ["--port", "1.5"], /1\.5/],
    ["server", ["--max-users", "many"], /many/],
  ];
  for (let i = 0; i < wrong.length; i += 3) {
    await Promise.all(
      wrong.slice(i, i + 3).map(async ([name, args, complaint]) => {
        const program = start(name, args);
        program.pipe("send bob hi");
        assert.equal(await program.ended, 2, program.evidence());
        assert.match(program.stderr(), complaint, program.evidence());
        assert.equal(program.stdout(), "");
        assert.ok(program.stderr().split("\n").length <= 4, `a short complaint:\n${program.evidence()}`);
      }),
    );
  }
});

scenario("--help is on stdout and names every option", async ({ start }) => {
  const options = {
    server:
      "port host alt-port alt-host identity password-file max-users max-per-address json trace quiet help version",
    client: "port secret-file weak-secret new-secret password-file identity stun no-direct json trace help version",
  };
  for (const name of ["server", "client"] as const) {
    const program = start(name, ["--help"]);
    assert.equal(await program.ended, 0, program.evidence());
    assert.equal(program.stderr(), "");
    for (const option of options[name].split(" ")) assert.ok(program.stdout().includes(`--${option}`), `--${option}`);
  }
});

scenario("--new-secret prints one of at least 80 bits, another one each time", async ({ start }) => {
  const runs = [start("client", ["--new-secret"]), start("client", ["--new-secret"])];
  for (const run of runs) {
    assert.equal(await run.ended, 0, run.evidence());
    assert.match(run.stdout(), /^\S+\n$/);
    assert.ok(run.stdout().replace(/[^a-z0-9]/g, "").length >= 16, run.stdout());
  }
  assert.notEqual(runs[0]!.stdout(), runs[1]!.stdout());
});

// ---------------------------------------------------------------------------------------------------- commands

scenario("piped lines are carried out in order, and each waits for its outcome", async ({ server, client, script }) => {
  const { at } = await server();
  const bob = await client(at, "bob");
  const lines = ["send bob one", "ping bob 2", "send bob two", "getu b", "", "  send bob  three", "path bob", "exit"];
  const alice = await script(at, "alice", [...lines, "send bob after the end"]);
  const outcomes = alice.events.map(({ event }) => event).filter((event) =>
    event !== "path" && event !== "reconnected"
  );
  const ours = ["sent", "ping", "ping", "sent", "users", "sent", "logout"];
  assert.deepEqual(outcomes, ["login", "users", ...ours], alice.evidence());
  assert.deepEqual(names(of(alice, "users")[1]!), ["bob"]);
  assert.deepEqual(of(bob, "message").map(({ text }) => text), ["one", "two", " three"]);
  assert.deepEqual(of(bob, "message").map(({ id }) => id), of(alice, "sent").map(({ id }) => id));
  assert.ok(of(alice, "ping").every(({ rttMs }) => rttMs !== null), alice.evidence());
});

scenario("block and unblock, piped: each has its outcome", async ({ server, client, script }) => {
  const { at } = await server(), bob = await client(at, "bob");
  const lines = ["block bob", "send bob hi", "block", "unblock bob", "unblock bob", "send bob ho"];
  const alice = await script(at, "alice", lines, { code: 1 });
  assert.deepEqual(of(alice, "blocked").map(({ peers }) => peers), [["bob"], ["bob"], []]);
  assert.deepEqual(of(alice, "sent").map(({ ok, reason }) => [ok, reason]), [[false, "blocked"], [true, undefined]]);
  assert.deepEqual(of(alice, "error").map(({ code }) => code), ["unknown"]);
  await bob.until({ event: "message", text: "ho" });
});

scenario("`getu PREFIX` as the first line: the list on login is not its answer", async ({ server, client, script }) => {
  const { at } = await server();
  for (const name of ["bob", "bodo", "carol"]) await client(at, name);
  const alice = await script(at, "alice", ["getu bo"]);
  assert.deepEqual(of(alice, "users").map(names), [["alice", "bob", "bodo", "carol"], ["bob", "bodo"]]);
  const dave = await script(at, "dave", ["getu x", "getu"]);
  assert.deepEqual(of(dave, "users").slice(1).map(names), [[], ["bob", "bodo", "carol", "dave"]]);
});

scenario("`sleep` waits, an ended input logs out, the last line needs no end", async ({ server, start, script }) => {
  const lobby = await server();
  const began = performance.now();
  await script(lobby.at, "alice", ["sleep 0.7", "sleep 0.7"]);
  assert.ok(performance.now() - began > 1_400);
  const alice = await script(lobby.at, "alice", []);
  assert.deepEqual(of(alice, "logout").length, 1);
  await lobby.until({ event: "logout", name: "alice", reason: "left" });
  const bob = start("client", [lobby.at, "bob", "--json"]);
  bob.type("send bob one\r\nsend bob two\r");
  bob.pipe();
  assert.equal(await bob.ended, 0, bob.evidence());
  assert.deepEqual(of(bob, "message").map(({ text }) => text), ["one", "two"]);
});

scenario(
  "what fails is told, makes the exit code 1, and does not stop the rest",
  async ({ server, client, script }) => {
    const { at } = await server();
    const bob = await client(at, "bob");
    const gone = await client(at, "gone");
    gone.pipe();
    await gone.ended;
    const tooLong = "x".repeat(MAX_MESSAGE_BYTES + 1);
    const fails: [string, string][] = [
      ["send nobody hi", "unknown"],
      ["send gone hi", "offline"],
      ["send bob", "empty"],
      ["send bob ", "empty"],
      [`send bob ${tooLong}`, "too-long"],
      [`send bob ${"\u00e9".repeat(MAX_MESSAGE_BYTES / 2)}e`, "too-long"],
    ];
    const alice = await script(at, "alice", [...fails.map(([line]) => line), "send bob hi"], { code: 1 });
    const sent = of(alice, "sent");
    assert.deepEqual(sent.map(({ ok, reason }) => ok ? "ok" : reason), [...fails.map(([, reason]) => reason), "ok"]);
    assert.deepEqual(of(alice, "error"), [], "one `sent` and no `error`");
    assert.deepEqual(of(bob, "message").map(({ text }) => text), ["hi"]);
  },
);

scenario("what is no command is an `error` of `usage`, and exit code 1", async ({ server, script }) => {
  const { at } = await server();
  const lines = ["frobnicate", "send", "ping", "ping alice 0", "ping alice many", "verify", "sleep", "sleep long"];
  const alice = await script(at, "alice", [...lines, "send alice hi"], { code: 1 });
  assert.deepEqual(of(alice, "error").map(({ code }) => code), lines.map(() => "usage"), alice.evidence());
  assert.equal(of(alice, "message").length, 1);
});

scenario("commands about somebody who is not there end too, with 1", async ({ server, script }) => {
  const { at } = await server();
  for (const line of ["path nobody", "verify nobody", "ping nobody 1"]) {
    const alice = await script(at, "alice", [line], { code: 1 });
    const told = alice.events.filter(({ event, lost }) => event === "error" || (event === "ping" && Number(lost) > 0));
    assert.equal(told.length, 1, `${line}\n${alice.evidence()}`);
  }
});

scenario("`help` is help, and with --json still nothing but objects on stdout", async ({ server, script, start }) => {
  const { at } = await server();
  const human = start("client", [at, "human"]);
  human.pipe("help");
  assert.equal(await human.ended, 0);
  for (const command of ["send NAME", "getu", "exit", "path", "ping NAME", "verify", "nat"]) {
    assert.ok(human.stdout().includes(command), `"${command}" in the help`);
  }
  await script(at, "alice", ["help"]);
});

scenario("64 KiB arrive as they were, and so do all the letters there are", async ({ server, client, script }) => {
  const { at } = await server();
  const bob = await client(at, "\u5c0f\u660e");
  const texts = [
    Array.from({ length: MAX_MESSAGE_BYTES / 8 }, (_, i) => String(i).padStart(8)).join("").replace(/^./, "x"),
    "\u00e9".repeat(MAX_MESSAGE_BYTES / 2),
    '\u{1f600} \u4f60\u597d "quoted" \\ \t \u0000 \u001b[31m',
  ];
  await script(at, "J\u00fcrgen", texts.map((text) => `send \u5c0f\u660e ${text}`));
  const messages = of(bob, "message");
  assert.equal(messages.length, texts.length);
  for (const [i, text] of texts.entries()) assert.ok(messages[i]!["text"] === text, `text ${i} is another one`);
  assert.ok(messages.every(({ from }) => from === "J\u00fcrgen"));
});

scenario("sending to oneself works, over the relay", async ({ server, script }) => {
  const { at } = await server();
  const alice = await script(at, "alice", ["send alice note to self", "send alice another"]);
  assert.deepEqual(of(alice, "message").map(({ from, text, path }) => `${from} ${text} ${path}`), [
    "alice note to self relay",
    "alice another relay",
  ]);
  assert.ok(of(alice, "sent").every(({ ok, path }) => ok && path === "relay"), alice.evidence());
});

scenario("`nat` tells what this network is like", async ({ server, script }) => {
  const { at } = await server();
  const alice = await script(at, "alice", ["nat", "send alice hi"]);
  assert.deepEqual(of(alice, "nat").map(({ udp, allocation }) => `${udp} ${allocation}`), ["true preserving"]);
});

scenario("two clients of one host meet directly, and see the same `verify` code", async ({ server, client }) => {
  const { at } = await server();
  const alice = await client(at, "alice"), bob = await client(at, "bob");
  await converse(alice, bob);
  alice.type("verify bob");
  bob.type("verify alice");
  const [one, other] = await Promise.all([alice, bob].map((program) => program.until({ event: "verify" })));
  assert.equal(one!["code"], other!["code"]);
});

scenario("--no-direct stays on the relay, on both sides", async ({ server, client }) => {
  const { at } = await server();
  const alice = await client(at, "alice", ["--no-direct"]), bob = await client(at, "bob");
  for (let i = 0; i < 4; i++) {
    for (const [one, other] of [[alice, bob], [bob, alice]] as const) {
      const from = one.events.length;
      one.type(`send ${other.name} ${i}`);
      await other.until({ event: "message", from: one.name, text: String(i), path: "relay" });
      await one.until({ event: "sent", ok: true, path: "relay" }, { from });
    }
    const from = alice.events.length;
    alice.type("ping bob 1"); // time enough for a punch, had there been one
    await alice.until({ event: "ping", path: "relay" }, { from });
  }
  assert.deepEqual([alice, bob].flatMap((program) => of(program, "path")), []);
});

scenario("without --json: chat and answers on stdout, the state of things on stderr", async ({ server, start }) => {
  const { at } = await server();
  const bob = start("client", [at, "bob"], { name: "bob" });
  bob.type("getu");
  await bob.says(/^ *bob /m);
  const alice = start("client", [at, "alice"], { name: "alice" });
  alice.pipe("send bob hi there", "getu", "ping bob 1", "send nobody hi");
  assert.equal(await alice.ended, 1, alice.evidence());
  assert.match(alice.stdout(), /^Send OK! .*\brelay\b.*\d ms/m);
  assert.match(alice.stdout(), /^Send Failure! .*nobody/m);
  assert.match(alice.stdout(), /^ *alice +127\.0\.0\.1:\d+\n *bob +127\.0\.0\.1:\d+$/m);
  assert.match(alice.stdout(), /^bob .*\d ms/m);
  assert.match(alice.stderr(), /alice/);
  assert.match(bob.stdout(), /^alice: hi there/m);
  for (const program of [alice, bob]) {
    assert.doesNotMatch(program.stdout(), /(?!\n)\p{Cc}|^>/mu, "no colours, no prompt");
  }
  bob.pipe();
  assert.equal(await bob.ended, 0, bob.evidence());
});

scenario("server without --json: everything on stderr; with --quiet nothing", async ({ start, script }) => {
  for (const quiet of [false, true]) {
    const port = await freePort();
    const args = ["--host", "127.0.0.1", "--port", String(port), "--alt-port", "0", ...quiet ? ["--quiet"] : []];
    const server = start("server", args);
    const [first, second] = quiet ? [/^$/, /^$/] : [/Listening on UDP port \d+/, /alice is here/];
    await answersAt(port);
    await script(`127.0.0.1:${port}`, "alice", ["send alice hi"]);
    server.signal("SIGINT");
    assert.equal(await server.ended, 0, server.evidence());
    assert.equal(server.stdout(), "");
    assert.match(server.stderr(), first);
    assert.match(server.stderr(), second);
  }
});

scenario("--trace: every datagram on stderr, and only there", async ({ server, client, script }) => {
  const lobby = await server(["--trace"]);
  await client(lobby.at, "bob");
  const alice = await script(lobby.at, "alice", ["send bob hi"], { args: ["--trace"] });
  for (const name of ["LOGIN", "COOKIE", "WELCOME", "P2PTRANS", "INTRODUCTION", "LOGOUT"]) {
    for (const program of [alice, lobby]) assert.match(program.stderr(), new RegExp(`\\b${name}\\b`), program.name);
  }
  assert.match(lobby.stderr(), /P2PSOMEONEWANTTOCALLYOU/);
});

// ---------------------------------------------------------------------------------------------------- names and signals

scenario("a name that is taken: a clear error, exit 1; free again after Ctrl-C, which is 130", async (stage) => {
  const server = await stage.server();
  const alice = await stage.client(server.at, "alice");
  const thief = await stage.script(server.at, "alice", ["send alice hi"], { code: 1 });
  assert.deepEqual(thief.events.map(({ event, code }) => `${event} ${code}`), ["error name-taken"]);
  assert.match(String(thief.events[0]!["message"]), /alice.*\d+ s/);
  const human = stage.start("client", [server.at, "alice"], { name: "human" });
  human.pipe("send alice hi");
  assert.equal(await human.ended, 1);
  assert.match(human.stderr(), /alice/);
  assert.equal(human.stdout(), "");
  alice.signal("SIGINT");
  assert.equal(await alice.ended, 130, alice.evidence());
  assert.equal(of(alice, "logout").length, 1);
  await server.until({ event: "logout", name: "alice", reason: "left" });
  await stage.client(server.at, "alice");
});

scenario("Ctrl-C while a `send` waits and before the login ends with 130 too", async ({ server, client, start }) => {
  const { at } = await server();
  const bob = await client(at, "bob");
  bob.signal("SIGSTOP");
  const alice = await client(at, "alice", ["--trace"]);
  const silent = await strange();
  const carol = start("client", [`127.0.0.1:${silent.address().port}`, "carol", "--json"]);
  await new Promise((resolve) => silent.once("message", resolve));
  alice.type("send bob hi");
  await alice.says(/P2PTRANS/);
  for (const program of [alice, carol]) {
    program.signal("SIGINT");
    assert.equal(await program.ended, 130, program.evidence());
  }
  silent.close();
});

scenario("--max-users: one too many is `full`, exit 1", async ({ server, client, script }) => {
  const { at } = await server(["--max-users", "1"]);
  await client(at, "alice");
  const bob = await script(at, "bob", [], { code: 1 });
  assert.deepEqual(bob.events.map(({ event, code }) => `${event} ${code}`), ["error full"]);
});

// ---------------------------------------------------------------------------------------------------- ports and addresses

async function freePort(): Promise<number> {
  const socket = await strange();
  const { port } = socket.address();
  await new Promise<void>((resolve) => socket.close(() => resolve()));
  return port;
}

scenario("a port in use: exit 1 and a sentence that names it", async ({ start }) => {
  const other = await strange("0.0.0.0");
  const port = String(other.address().port);
  const programs = [start("server", ["--port", port]), start("client", ["127.0.0.1", "alice", "--port", port])];
  for (const program of programs) {
    program.pipe();
    assert.equal(await program.ended, 1, program.evidence());
    assert.match(program.stderr(), new RegExp(`^Cannot bind UDP port "${port}": address already in use.*\n$`));
    assert.equal(program.stdout(), "");
  }
  other.close();
});

scenario("with --json a port in use is an `error` event too", async ({ start }) => {
  const other = await strange("0.0.0.0");
  const port = String(other.address().port);
  for (const [name, args] of [["server", []], ["client", ["127.0.0.1", "alice"]]] as const) {
    const program = start(name, [...args, "--json", "--port", port]);
    program.pipe();
    assert.equal(await program.ended, 1, program.evidence());
    assert.deepEqual(program.events.map(({ event, code }) => `${event} ${code}`), ["error bind"]);
  }
  other.close();
});

scenario("--port: the server sees the client at that port", async ({ server, client }) => {
  const { at } = await server();
  const port = await freePort();
  const alice = await client(at, "alice", ["--port", String(port)]);
  assert.equal(of(alice, "login")[0]!["public"], `127.0.0.1:${port}`);
  assert.equal(of(alice, "login")[0]!["server"], at);
});

const addresses = Object.values(networkInterfaces()).flatMap((entries) => entries ?? []).map(({ address }) => address);
const noIPv6 = !addresses.includes("::1") && "this host has no ::1";

scenario("an IPv6 literal as SERVER: [::1]:PORT", async ({ server, client }) => {
  const { at } = await server([], { host: "::1" });
  const alice = await client(at, "alice"), bob = await client(at, "bob");
  assert.match(String(of(alice, "login")[0]!["public"]), /^\[::1\]:\d+$/);
  await converse(alice, bob);
}, noIPv6);

scenario("--host :: serves IPv4 and IPv6, and brings the two together", async ({ server, client }) => {
  const { port } = await server([], { host: "::" });
  const alice = await client(`127.0.0.1:${port}`, "alice"), bob = await client(`[::1]:${port}`, "bob");
  alice.type("send bob hi");
  await bob.until({ event: "message", text: "hi" });
  await alice.until({ event: "sent", ok: true });
}, noIPv6);

scenario("datagrams from strangers change nothing, for the server or for a client", async ({ server, client }) => {
  const { at, port } = await server();
  const alice = await client(at, "alice"), bob = await client(at, "bob");
  const ports = [
    port,
    ...[alice, bob].map((program) => Number(/\d+$/.exec(String(of(program, "login")[0]!["public"]))![0])),
  ];
  const stranger = await strange();
  const noise = [[], [0], [0x50], [0x50, 1], Array(1200).fill(0x50), Array(3000).fill(7), [
    0x50,
    103,
    ...Array(40).fill(9),
  ]];
  const sent = noise.flatMap((data) =>
    ports.map((to) => new Promise((resolve) => stranger.send(Uint8Array.from(data), to, "127.0.0.1", resolve)))
  );
  await Promise.all(sent); // on the loopback that is as good as received
  stranger.close();
  await converse(alice, bob);
});

// ---------------------------------------------------------------------------------------------------- keys and secrets

scenario("--identity: created for its owner alone, the same key again, and it holds the name", async (stage) => {
  const { at } = await stage.server();
  const bob = await stage.client(at, "bob");
  const file = join(stage.directory, "identity");
  const codes: unknown[] = [];
  for (let run = 0; run < 2; run++) {
    const alice = await stage.client(at, "alice", ["--identity", file]);
    assert.equal(statSync(file).mode & 0o777, 0o600);
    alice.type("verify bob");
    codes.push((await alice.until({ event: "verify" }))["code"]);
    alice.signal("SIGKILL"); // its session lives on
    await alice.ended;
    await stage.script(at, "alice", [], { code: 1 });
  }
  assert.equal(codes[0], codes[1]);
  const other = await stage.script(at, "other", ["verify bob"], { args: ["--identity", join(stage.directory, "b")] });
  assert.notEqual(of(other, "verify")[0]!["code"], codes[0]);
  bob.pipe();
  await bob.ended;
});

scenario("--identity: a file that others can read, or that is none, is refused", async ({ start, file }) => {
  const silent = await strange();
  const at = `127.0.0.1:${silent.address().port}`;
  let heard = 0;
  silent.on("message", () => heard++);
  const files: [string, RegExp][] = [
    [file("open", "00".repeat(32) + "\n", 0o640), /chmod 600/],
    [file("wrong", "nonsense\n"), /not an identity/],
    [join("no", "such", "directory", "identity"), /identity/],
  ];
  for (const [name, complaint] of files) {
    const alice = start("client", [at, "alice", "--identity", name]);
    alice.pipe();
    assert.equal(await alice.ended, 1, alice.evidence());
    assert.match(alice.stderr(), complaint);
  }
  assert.equal(heard, 0, "nothing was sent");
  silent.close();
  assert.equal(readFileSync(files[1]![0], "utf8"), "nonsense\n");
});

scenario("--secret-file and PUNCH_SECRET: the same secret talks", async ({ server, client, script, file }) => {
  const { at } = await server();
  const words = "correct horse battery staple";
  const bob = await client(at, "bob", ["--secret-file", file("secret", `${words}\n`)]);
  await script(at, "alice", ["send bob hi", "sleep 0.2", "send bob again"], { env: { PUNCH_SECRET: words } });
  assert.deepEqual(of(bob, "message").map(({ text }) => text), ["hi", "again"]);
});

scenario("a secret or password file that is missing or empty: exit 1, and its name", async ({ start, file }) => {
  const programs: ["server" | "client", string[]][] = [
    ["client", ["127.0.0.1", "alice", "--secret-file"]],
    ["client", ["127.0.0.1", "alice", "--password-file"]],
    ["server", ["--port", "0", "--password-file"]],
  ];
  for (const [name, args] of programs) {
    for (
      const [path, why] of [[join("no", "such", "file"), /no such file/i], [file("empty", "\n"), /empty/]] as const
    ) {
      const program = start(name, [...args, path]);
      program.pipe();
      assert.equal(await program.ended, 1, program.evidence());
      assert.ok(program.stderr().includes(path), program.evidence());
      assert.match(program.stderr(), why);
    }
  }
});

scenario("--password-file: the right one is let in, a wrong one or none is not", async ({ server, script, file }) => {
  const right = file("right", "open sesame\n");
  const { at } = await server(["--password-file", right]);
  await script(at, "alice", ["send alice hi"], { args: ["--password-file", right] });
  await script(at, "alice", ["send alice hi"], { env: { PUNCH_PASSWORD: "open sesame" } });
  for (const args of [["--password-file", file("wrong", "close sesame\n")], []]) {
    const alice = await script(at, "alice", ["send alice hi"], { args, code: 1 });
    assert.deepEqual(alice.events.map(({ event, code }) => `${event} ${code}`), ["error bad-password"]);
  }
});

scenario("PUNCH_PASSWORD of the server: nobody is let in without it", async ({ server, script }) => {
  const env = { PUNCH_PASSWORD: "open sesame" };
  const { at } = await server([], { env });
  await script(at, "alice", ["send alice hi"], { env });
  const bob = await script(at, "bob", ["send bob hi"], { code: 1 });
  assert.deepEqual(bob.events.map(({ event, code }) => `${event} ${code}`), ["error bad-password"]);
});

// ---------------------------------------------------------------------------------------------------- both runtimes

const noOther = !executable(OTHER) && `no ${OTHER} on the PATH`;

for (const [server, one, other] of [[OWN, OWN, OTHER], [OTHER, OTHER, OWN], [OWN, OTHER, OTHER], [OTHER, OWN, OWN]]) {
  scenario(`a ${server} server, alice on ${one}, bob on ${other}: a conversation`, async (stage) => {
    const { at } = await stage.server([], { runtime: server! });
    const alice = await stage.client(at, "alice", [], { runtime: one! });
    const bob = await stage.client(at, "bob", [], { runtime: other! });
    await converse(alice, bob);
  }, noOther);
}
