/**
 * Punch in five seconds: a real server and two real clients, as processes of this machine, meet and talk, and this
 * file tells what happens. On one machine nothing has to be punched, but it is the same dialogue as between two homes.
 *
 *     alice ---- hello ----> server ---- hello ----> bob        the first message goes over the relay ...
 *       |<------------------- punch! ------------------>|       ... which introduces the two,
 *       |------------------- again -------------------->|       and from then on it is not needed
 *
 *     deno task demo      or      bun lab/demo.ts
 *
 * With both runtimes on the PATH bob runs on the other one.
 *
 * @module
 */
import process from "node:process";
import { executable, OTHER, OWN, running, type Runtime, start } from "./programs.ts";

/** For all of it: a machine that has other things to do starts programs slowly. */
const LIMIT_MS = 60_000;

// ---------------------------------------------------------------------------------------------------- the story

const hasColours = process.stdout.isTTY === true && !process.env["NO_COLOR"];
const paint = (colour: number, text: string) => hasColours ? `\x1b[${colour}m${text}\x1b[0m` : text;
const COLOURS: Record<string, number> = { server: 33, alice: 36, bob: 35 };
const NAMES: Record<Runtime, string> = { deno: "Deno", bun: "Bun" };

let beganAt = 0;

/** One line of the story: when, who, what. */
function tell(who: string, what: string, at = performance.now()): void {
  const time = `${(at - beganAt).toFixed(0)} ms`.padStart(8);
  console.log(`${paint(2, time)}  ${paint(COLOURS[who] ?? 1, who.padEnd(7))} ${what}`);
}

const heading = (text: string) => console.log(`\n${paint(1, text)}`);
const ways = (path: unknown) => path === "relay" ? paint(33, "over the server") : paint(32, `directly (${path})`);

async function play(): Promise<void> {
  const bobs = executable(OTHER) ? OTHER : OWN;
  console.log(
    `${paint(1, "Punch")}: a server and two clients, three processes on this machine; server and alice on ` +
      `${NAMES[OWN]}, bob on ${NAMES[bobs]}` + (bobs === OWN ? `, as there is no ${NAMES[OTHER]} on the PATH` : ""),
  );
  beganAt = performance.now();

  heading("Log in");
  const server = start("server", ["--host", "127.0.0.1", "--port", "0", "--json"]);
  const listening = await server.until({ event: "listening" });
  tell("server", `listens on UDP port ${listening["port"]}`, listening.at);
  const at = `127.0.0.1:${listening["port"]}`;
  const alice = start("client", [at, "alice", "--json", "--trace"], { name: "alice" });
  const bob = start("client", [at, "bob", "--json", "--trace"], { name: "bob", runtime: bobs });
  const logins = await Promise.all([alice, bob].map((client) => client.until({ event: "login" })));
  for (const { name, public: endpoint, at } of logins.toSorted((one, other) => one.at - other.at)) {
    tell(String(name), `is in; the server sees ${name} at ${endpoint}`, at);
  }
  // Whoever came first hears of the other; then no question is left to ask before the first message.
  await Promise.all([alice, bob].map((client) => client.until({ event: "users" })));

  heading("alice types: send bob Hello, can you hear me?");
  const typedAt = performance.now();
  alice.type("send bob Hello, can you hear me?");
  const lines: Parameters<typeof tell>[] = [];
  const first = await bob.until({ event: "message", from: "alice" });
  const delay = after(first.at - typedAt);
  lines.push(["bob", `reads "${first["text"]}", ${delay} alice typed it, ${ways(first["path"])}`, first.at]);
  for (const [client, peer] of [[alice, "bob"], [bob, "alice"]] as const) {
    const { address, ms, at } = await client.until({ event: "path", peer, path: /lan|direct/ });
    const punches = client.stderr().match(/-> \S+ P2P(TRASH|FIRST|SECOND) /g) ?? [];
    lines.push([client.name, `has punched towards ${address} and others, ${punches.length} datagrams`, at]);
    lines.push([client.name, `has a direct path to ${peer}, ${ms} ms after the call began`, at]);
  }
  const sent = await alice.until({ event: "sent", to: "bob" });
  if (!sent["ok"]) throw new Error(`The first message failed: ${sent["reason"]}`);
  lines.push(["alice", `Send OK! (after ${sent["ms"]} ms, ${ways(sent["path"])})`, sent.at]);
  for (const line of lines.toSorted(([, , one], [, , other]) => one! - other!)) tell(...line);

  heading("The next messages no longer meet the server");
  for (
    const [from, to, text] of [[bob, alice, "Loud and clear."], [alice, bob, "Then the server may rest."]] as const
  ) {
    const saidAt = performance.now(), known = to.events.length, before = from.events.length;
    from.type(`send ${to.name} ${text}`);
    const heard = await to.until({ event: "message", from: from.name }, { from: known });
    tell(
      to.name,
      `reads "${heard["text"]}", ${after(heard.at - saidAt)} ${from.name} typed it, ${ways(heard["path"])}`,
    );
    const { ok, ms, path, at } = await from.until({ event: "sent", to: to.name }, { from: before });
    if (!ok) throw new Error(`A message of ${from.name} failed`);
    tell(from.name, `Send OK! (after ${ms} ms, ${ways(path)})`, at);
  }

  heading("alice types: ping bob 3");
  alice.type("ping bob 3");
  for (let count = 0, from = 0; count < 3; count++) {
    const pong = await alice.until({ event: "ping", peer: "bob" }, { from });
    if (typeof pong["rttMs"] !== "number") throw new Error("bob does not answer to a ping");
    from = alice.events.indexOf(pong) + 1;
    tell("alice", `bob answers in ${pong["rttMs"]} ms, ${ways(pong["path"])}`, pong.at);
  }

  heading("Good bye");
  for (const client of [alice, bob]) {
    client.pipe("exit");
    await client.ended.then((how) => {
      if (how !== 0) throw new Error(`${client.name} ended with ${how}`);
    });
    tell(client.name, "is gone");
  }
  server.signal("SIGTERM");
  const how = await server.ended;
  if (how !== 0) throw new Error(`The server ended with ${how}`);
  tell("server", "is gone");
}

const after = (ms: number) => `${ms.toFixed(1)} ms after`;

async function main(): Promise<number> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`Nothing came of it within ${LIMIT_MS / 1000} s`)), LIMIT_MS);
  });
  try {
    await Promise.race([play(), late]);
    return 0;
  } catch (error) {
    console.error(`\nThe demo failed: ${(error as Error).message}`);
    for (const program of running) console.error(program.evidence());
    return 1;
  } finally {
    clearTimeout(timer);
    for (const program of running) program.signal("SIGKILL");
    await Promise.all([...running].map(({ ended }) => ended));
  }
}

if (import.meta.main) process.exit(await main());
