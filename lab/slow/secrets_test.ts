/**
 * Secrets, identities and packages on real processes: each case is something that went wrong silently, or an attack.
 * As in programs_test.ts, `deno test` starts the programs on Deno, with the permissions of their tasks, and `bun test`
 * on Bun.
 *
 * @module
 */
import assert from "node:assert/strict";
import { execFileSync, spawn, spawnSync } from "node:child_process";
import { chmodSync, chownSync, copyFileSync, existsSync, mkdirSync, readdirSync, readFileSync } from "node:fs";
import { statSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { executable, flagsFor, OWN, wordsOf } from "../programs.ts";
import { of, scenario, type Stage } from "../stage.ts";

const ROOT = fileURLToPath(new URL("../..", import.meta.url).href);
const SECRET = "abcd-efgh-ijkm-npqr-stuv", OTHER_SECRET = "vuts-rqpn-mkji-hgfe-dcba";
const MODULES = ["server.ts", "client.ts", "protocol.ts"];
const isRoot = process.getuid?.() === 0;
const notRoot = !isRoot && "only root can do that", notDeno = OWN !== "deno" && "Bun asks for no permission";
const DENO_BARE = ["run", "--unstable-net", "--allow-net"]; // no other permission

// ---------------------------------------------------------------------------------------------------- four starts

scenario(
  "Deno without --allow-env: the first line says which variables do not count, and nothing asks",
  async (stage) => {
    const env = { PUNCH_SECRET: SECRET, PUNCH_PASSWORD: "open sesame" };
    const server = stage.start("server", ["--host", "127.0.0.1", "--port", "0", "--alt-port", "0", "--json"], {
      env,
      words: [...DENO_BARE, "server.ts"],
    });
    const listening = await server.until({ event: "listening", password: false, secret: false });
    assert.match(server.stderr().split("\n")[0]!, /PUNCH_PASSWORD.*--allow-env=PUNCH_PASSWORD/);
    const alice = stage.start("client", [`127.0.0.1:${listening["port"]}`, "alice", "--json"], {
      env,
      words: [...DENO_BARE, "client.ts"],
    });
    await alice.until({ event: "login", secret: false, password: false });
    assert.match(
      alice.stderr().split("\n")[0]!,
      /PUNCH_SECRET and PUNCH_PASSWORD.*--allow-env=PUNCH_SECRET,PUNCH_PASSWORD/,
    );
  },
  notDeno,
);

scenario("`login` and `listening` say whether there is a secret and a password", async ({ server, client, start }) => {
  const env = { PUNCH_SECRET: SECRET, PUNCH_PASSWORD: "open sesame" }, { at, ...open } = await server();
  assert.ok(of(open as never, "listening").every(({ password }) => password === false));
  const guarded = await server([], { env });
  assert.ok(of(guarded, "listening").every(({ password, secret }) => password === true && secret === false));
  const plain = await client(at, "plain");
  assert.ok(of(plain, "login").every(({ password, secret }) => password === false && secret === false));
  assert.equal(plain.stderr(), "");
  const alice = start("client", [guarded.at, "alice", "--json"], { env });
  await alice.until({ event: "login", password: true, secret: true });
});

scenario("a variable that is set and blank is an error: exit 1, and its name", async ({ start }) => {
  for (const value of ["", "  "]) {
    for (
      const [program, args, variable] of [
        ["server", ["--port", "0"], "PUNCH_PASSWORD"],
        ["client", ["127.0.0.1", "alice"], "PUNCH_PASSWORD"],
        ["client", ["127.0.0.1", "alice"], "PUNCH_SECRET"],
      ] as const
    ) {
      const run = start(program, [...args], { env: { [variable]: value } });
      run.pipe();
      assert.equal(await run.ended, 1, run.evidence());
      assert.match(run.stderr(), new RegExp(`${variable} is blank`));
      assert.equal(run.stdout(), "");
    }
  }
});

scenario("Deno without --allow-read, and no terminal: exit 1, and the flag that it takes", async ({ start, file }) => {
  const name = file("secret", SECRET), args = ["127.0.0.1", "alice", "--secret-file", name];
  const run = start("client", args, { words: wordsOf("client") });
  run.pipe();
  assert.equal(await run.ended, 1, run.evidence());
  assert.ok(run.stderr().includes(`--allow-read=${name}`), run.evidence());
  const identity = join(name, "..", "identity");
  const server = start("server", ["--port", "0", "--identity", identity], {
    words: ["run", `--allow-read=${join(name, "..")}`, ...wordsOf("server").slice(1)],
  });
  assert.equal(await server.ended, 1, server.evidence());
  assert.ok(server.stderr().includes(`--allow-write=${join(name, "..")}`), server.evidence());
  assert.ok(!existsSync(identity));
}, notDeno);

// ---------------------------------------------------------------------------------------------------- files

/** Starts each kind of program with that file; what became of it. */
async function withFile({ start }: Stage, path: string): Promise<{ code: unknown; stderr: string }[]> {
  const runs = [
    start("client", ["127.0.0.1:9", "alice", "--secret-file", path]),
    start("client", ["127.0.0.1:9", "alice", "--password-file", path]),
    start("client", ["127.0.0.1:9", "alice", "--identity", path]),
    start("server", ["--port", "0", "--password-file", path]),
    start("server", ["--port", "0", "--identity", path]),
  ];
  return await Promise.all(runs.map(async (run) => {
    run.pipe();
    return { code: await run.ended, stderr: run.stderr() };
  }));
}

scenario("a file that others can read, or that is somebody else's, is refused, also through a link", async (stage) => {
  const { file } = stage, good = "00".repeat(32);
  const shown = file("shown", good, 0o600), group = file("group", good, 0o600), link = `${shown}.link`;
  chmodSync(shown, 0o644);
  chmodSync(group, 0o640);
  symlinkSync(shown, link);
  const writable = file("writable", good);
  chmodSync(writable, 0o620);
  for (const path of [shown, group, writable, link]) {
    for (const { code, stderr } of await withFile(stage, path)) {
      assert.equal(code, 1, stderr);
      assert.ok(stderr.includes(path) && /chmod 600/.test(stderr), stderr);
    }
  }
  if (!isRoot) return;
  const theirs = file("theirs", good);
  chownSync(theirs, 65_534, 65_534);
  for (const { code, stderr } of await withFile(stage, theirs)) {
    assert.equal(code, 1, stderr);
    assert.match(stderr, /owns.*chown/);
  }
});

scenario("a file that is no file, no text, empty or too long is an error that names it", async (stage) => {
  const { file } = stage;
  const cases: [path: string, why: RegExp][] = [
    [join(stage.directory, "missing", "file"), /no such file/i],
    [stage.directory, /it is a folder/],
    [file("empty", ""), /empty|not an identity/],
    [file("blank", " \n\t\n"), /empty|not an identity/],
    [file("long", "x".repeat(70_000)), /65536/],
  ];
  writeFileSync(file("binary", ""), Uint8Array.of(255, 254, 0, 65), { mode: 0o600 });
  cases.push([join(stage.directory, "binary"), /UTF-8/]);
  const before = readdirSync(stage.directory);
  for (const [path, why] of cases) {
    for (const { code, stderr } of await withFile(stage, path)) {
      assert.equal(code, 1, stderr);
      assert.ok(stderr.includes(path) && why.test(stderr), stderr);
    }
  }
  assert.deepEqual(readdirSync(stage.directory), before);
  assert.equal(readFileSync(join(stage.directory, "blank"), "utf8"), " \n\t\n", "left as it was");
});

/** A user who is not root: his own folder with the programs in it, and what starts one of them there as him. */
const NOBODY = 65_534;
const AS_NOBODY = ["--reuid", `${NOBODY}`, "--regid", `${NOBODY}`, "--clear-groups"];

function noNobody(): string | false {
  if (!isRoot) return notRoot;
  const { status } = spawnSync("setpriv", [...AS_NOBODY, executable(OWN)!, "--version"], { stdio: "ignore" });
  return status !== 0 && "nobody else may run this runtime, or there is no setpriv";
}

scenario("somebody who is not root can use his own file, and nobody else's", async (stage) => {
  const { directory, file } = stage, cwd = join(directory, "punch"), { at } = await stage.server();
  chmodSync(directory, 0o755);
  mkdirSync(cwd);
  for (const module of MODULES) copyFileSync(join(ROOT, module), join(cwd, module));
  chownSync(cwd, NOBODY, NOBODY);
  const own = (name: string, mode: number, uid = NOBODY) => {
    const path = file(name, SECRET);
    chownSync(path, uid, NOBODY);
    chmodSync(path, mode);
    return path;
  };
  const cases: [path: string, code: number, why: RegExp][] = [
    [own("closed", 0), 1, /Cannot read the secret file ".*closed": .*permission denied/i],
    [own("of-root", 0o600, 0), 1, /Cannot read the secret file ".*of-root": .*permission denied/i],
    [own("shared", 0o640, 0), 1, /Others can read or change the secret file ".*shared": chmod 600/],
    [own("theirs", 0o640, 1), 1, /Somebody else owns the secret file ".*theirs": make it yours with chown/],
    [own("good", 0o600), 0, /^Logged out/],
  ];
  await Promise.all(cases.map(async ([path, code, why], i) => {
    const args = [at, `user${i}`, "--secret-file", path];
    const words = [executable(OWN)!, ...wordsOf("client", OWN, ["--unstable-net", ...flagsFor(args)]), ...args];
    const run = spawn("timeout", ["60", "setpriv", ...AS_NOBODY, ...words], {
      cwd,
      env: { HOME: cwd, DENO_DIR: join(cwd, "deno"), PATH: process.env["PATH"], DENO_NO_UPDATE_CHECK: "1" } as never,
      stdio: ["ignore", "pipe", "pipe"],
    });
    let stderr = "";
    run.stderr.setEncoding("utf8").on("data", (text: string) => stderr += text);
    assert.equal(await new Promise((resolve) => run.on("close", resolve)), code, `${path}: ${stderr}`);
    assert.match(code === 0 ? stderr.trim().split("\n").at(-1)! : stderr, why);
  }));
}, noNobody());

scenario("a file without a name is a wrong command line", async ({ start }) => {
  const options = ["--secret-file=", "--password-file=", "--identity="];
  await Promise.all(options.map(async (option) => {
    const run = start("client", ["127.0.0.1:9", "alice", option]);
    run.pipe();
    assert.equal(await run.ended, 2, run.evidence());
    assert.match(run.stderr(), /has no name\nTry --help\n$/);
  }));
});

scenario("on a read-only mount, where nobody can change modes, a warning is all", async (stage) => {
  const mount = join(stage.directory, "mount"), path = join(mount, "secret"), identity = join(mount, "identity");
  mkdirSync(mount);
  execFileSync("mount", ["-t", "tmpfs", "none", mount]);
  try {
    writeFileSync(path, SECRET, { mode: 0o444 });
    writeFileSync(identity, "01".repeat(32));
    for (const shown of [path, identity]) chmodSync(shown, 0o444);
    execFileSync("mount", ["-o", "remount,ro", mount]);
    const { at } = await stage.server();
    const alice = stage.start("client", [at, "alice", "--json", "--secret-file", path]);
    await alice.until({ event: "login", secret: true });
    assert.match(alice.stderr(), /Others can read or change the secret file .*, as far as its mode says/);
    alice.pipe();
    assert.equal(await alice.ended, 0, alice.evidence());
    const guarded = await stage.server(["--password-file", path, "--identity", identity]);
    assert.match(guarded.stderr(), /the password file .*\n.*the identity file /);
    const bob = await stage.client(guarded.at, "bob", ["--password-file", path, "--identity", identity]);
    assert.match(bob.stderr(), /the password file .*\n.*the identity file /);
    assert.ok(of(bob, "login").every(({ password, kept }) => password === true && kept === true));
  } finally {
    execFileSync("umount", ["-l", mount]);
  }
}, notRoot);

scenario("--identity is made whole, for its owner alone; two programs at once get the same one", async (stage) => {
  const { start, directory } = stage, path = join(directory, "identity");
  const args = ["--host", "127.0.0.1", "--port", "0", "--alt-port", "0", "--json", "--identity", path];
  const servers = [1, 2, 3].map(() => start("server", args));
  const seen = await Promise.all(servers.map((server) => server.until({ event: "listening", kept: true })));
  assert.equal(new Set(seen.map(({ fingerprint }) => fingerprint)).size, 1);
  assert.equal(statSync(path).mode & 0o777, 0o600);
  assert.match(readFileSync(path, "utf8"), /^[0-9a-f]{64}\n$/);
  assert.deepEqual(readdirSync(directory), ["identity"]);
});

scenario("--identity of clients: two who start at once on the same missing file have the same key", async (stage) => {
  const folder = join(stage.directory, "keys"), path = join(folder, "identity");
  mkdirSync(folder);
  const { at } = await stage.server(), bob = await stage.client(at, "bob");
  const both = await Promise.all(["alice", "carol"].map((name) => stage.client(at, name, ["--identity", path])));
  const codes = await Promise.all(both.map(async (client) => {
    client.type("verify bob");
    return (await client.until({ event: "verify" }))["code"];
  }));
  assert.equal(codes[0], codes[1]);
  assert.equal(statSync(path).mode & 0o777, 0o600);
  assert.deepEqual(readdirSync(folder), ["identity"]);
  bob.pipe();
  await bob.ended;
});

// ---------------------------------------------------------------------------------------------------- typed

/** Of a program on a terminal that does not say what it should. */
const TERMINAL_LIMIT_MS = 60_000;
/** The question is there a moment before what is typed is no longer shown. */
const UNSEEN_MS = 300;

/** Types on a terminal of its own, each text when that has been shown, and returns all that it shows. */
function onTerminal(
  args: string[],
  typed: [after: RegExp, text: string][],
  { env = {}, words = wordsOf("client", OWN, flagsFor(args)) }: { env?: Record<string, string>; words?: string[] } = {},
): Promise<{ shown: string; code: unknown }> {
  const command = [executable(OWN)!, ...words, ...args].map((word) => `'${word}'`);
  const { PUNCH_SECRET: _secret, PUNCH_PASSWORD: _password, ...inherited } = process.env;
  const child = spawn("script", ["-qefc", command.join(" "), "/dev/null"], {
    cwd: ROOT,
    env: { ...inherited, DENO_NO_UPDATE_CHECK: "1", NO_COLOR: "1", TERM: "xterm", ...env },
  });
  let shown = "", from = 0, isWaiting = false;
  const left = [...typed];
  child.stdin.on("error", () => {});
  child.stdout.setEncoding("utf8").on("data", (text: string) => {
    shown += text;
    if (isWaiting || !left[0]?.[0].test(shown.slice(from))) return;
    isWaiting = true;
    setTimeout(() => {
      from = shown.length;
      isWaiting = false;
      child.stdin.write(left.shift()![1]);
    }, UNSEEN_MS);
  });
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => child.kill("SIGKILL"), TERMINAL_LIMIT_MS);
    child.on("error", reject);
    child.on("close", (code) => {
      clearTimeout(timer);
      resolve({ shown, code });
    });
  });
}

scenario('"-" needs a terminal: elsewhere it is an error', async ({ server, start }) => {
  const { at } = await server();
  for (const option of ["--secret-file", "--password-file"]) {
    const run = start("client", [at, "alice", option, "-"]);
    run.pipe(SECRET);
    assert.equal(await run.ended, 1, run.evidence());
    assert.match(run.stderr(), /no terminal/);
    assert.equal(run.stdout(), "");
  }
  const run = start("server", ["--port", "0", "--password-file", "-"]);
  run.pipe(SECRET);
  assert.equal(await run.ended, 1, run.evidence());
  assert.match(run.stderr(), /no terminal/);
});

scenario('"-" asks on a terminal, and shows nothing of what is typed there', async ({ server }) => {
  const password = "open sesame", { at } = await server([], { env: { PUNCH_PASSWORD: password } });
  const { shown, code } = await onTerminal([at, "alice", "--secret-file", "-", "--password-file", "-"], [
    [/The secret: /, `${SECRET}\r`],
    [/The password: /, `${password}\r`],
    [/1 user/, "send alice hi\r"],
    [/alice: hi/, "exit\r"],
  ]);
  assert.equal(code, 0, shown);
  assert.match(shown, /alice: hi {2}\(relay\)/);
  for (const typed of [SECRET, password]) {
    for (let i = 0; i + 6 <= typed.length; i++) assert.ok(!shown.includes(typed.slice(i, i + 6)), shown);
  }
  const inJson = await onTerminal([at, "bob", "--json", "--secret-file", "-", "--password-file", "-"], [
    [/The secret: /, `${SECRET}\r`],
    [/The password: /, `${password}\r`],
    [/"event":"users"/, "exit\r"],
  ]);
  assert.equal(inJson.code, 0, inJson.shown);
  assert.match(inJson.shown, /"event":"login".*"password":true,"secret":true/);
});

scenario('Ctrl-C ends "-" with 130, Ctrl-D and nothing at all with 1', async ({ server }) => {
  const { at } = await server();
  for (const label of ["secret", "password"]) {
    const ask = new RegExp(`The ${label}: `), args = [at, "alice", `--${label}-file`, "-"];
    const [stopped, ended, nothing] = await Promise.all([
      onTerminal(args, [[ask, "abcd\x03"]]),
      onTerminal(args, [[ask, "\x04"]]),
      onTerminal(args, [[ask, " \r"]]),
    ]);
    assert.equal(stopped.code, 130, stopped.shown);
    for (const { code, shown } of [ended, nothing]) {
      assert.equal(code, 1, shown);
      assert.match(shown, new RegExp(`No ${label} was typed`));
    }
  }
});

scenario("on a terminal too, Deno without --allow-env asks for no permission", async ({ server }) => {
  const { at } = await server(), words = ["run", "--unstable-net", "--allow-net", "--allow-sys=networkInterfaces"];
  const { shown, code } = await onTerminal([at, "alice"], [[/1 user/, "exit\r"]], {
    env: { PUNCH_SECRET: SECRET },
    words: [...words, "client.ts"],
  });
  assert.equal(code, 0, shown);
  assert.match(shown, /^PUNCH_SECRET and PUNCH_PASSWORD cannot be seen/);
  assert.doesNotMatch(shown, /Allow\?|prompt/i);
}, notDeno);

// ---------------------------------------------------------------------------------------------------- the server

scenario("a fingerprint: only the server that has it will do", async ({ server, client, start, directory }) => {
  const identity = join(directory, "identity"), { at, events } = await server(["--identity", identity]);
  const fingerprint = String(events.find(({ event }) => event === "listening")!["fingerprint"]);
  for (const [i, written] of [fingerprint, fingerprint.replaceAll("-", "").toUpperCase()].entries()) {
    const user = await client(`${at}#${written}`, `user${i}`);
    assert.equal(of(user, "login")[0]!["fingerprint"], fingerprint);
    assert.equal(of(user, "login")[0]!["kept"], true);
  }
  const wrong = start("client", [`${at}#${SECRET}`, "carol", "--json"]);
  wrong.pipe("send user0 hi");
  const began = performance.now();
  assert.equal(await wrong.ended, 1, wrong.evidence());
  assert.ok(performance.now() - began < 5_000, "nobody waits for another server");
  assert.deepEqual(wrong.events.map(({ event, code }) => `${event} ${code}`), ["error server-key"]);
  for (const malformed of ["", "abc", `${fingerprint}a`, "0".repeat(20)]) {
    const run = start("client", [`${at}#${malformed}`, "carol"]);
    run.pipe();
    assert.equal(await run.ended, 2, run.evidence());
  }
});

scenario("a server that keeps its key and comes back with another one ends the session", async (stage) => {
  const { server, client, start, directory } = stage, identity = join(directory, "identity");
  const first = await server(["--identity", identity]), port = ["--port", String(first.port), "--alt-port", "0"];
  const alice = await client(first.at, "alice");
  first.signal("SIGTERM");
  await first.ended;
  const again = await server([...port, "--identity", identity]);
  await alice.until({ event: "reconnected" });
  assert.deepEqual(of(alice, "error"), []);
  again.signal("SIGTERM");
  await again.ended;
  start("server", ["--host", "127.0.0.1", ...port, "--json"]);
  await alice.until({ event: "error", code: "server-key" });
  assert.equal(await alice.ended, 1, alice.evidence());
});

scenario("a server that keeps no key may come back with another one, and the user is told", async (stage) => {
  const first = await stage.server(), alice = await stage.client(first.at, "alice");
  first.signal("SIGTERM");
  await first.ended;
  await stage.server(["--port", String(first.port), "--alt-port", "0"]);
  await alice.until({ event: "error", code: "server-key-changed", notice: true });
  await alice.until({ event: "reconnected" });
  alice.type("send alice hi");
  await alice.until({ event: "message", text: "hi" });
  alice.pipe();
  assert.equal(await alice.ended, 0, alice.evidence());
});

scenario("a password that only one of the two has: neither talks to the other", async ({ server, start }) => {
  const env = { PUNCH_PASSWORD: "open sesame" }, open = await server(), guarded = await server([], { env });
  const cases = [[open, env, "no-password"], [guarded, {}, "bad-password"], [guarded, {
    PUNCH_PASSWORD: "open barley",
  }, "bad-password"]] as const;
  for (const [{ at }, env, code] of cases) {
    const alice = start("client", [at, "alice", "--json"], { env });
    alice.pipe();
    assert.equal(await alice.ended, 1, alice.evidence());
    assert.deepEqual(alice.events.map(({ event, code }) => `${event} ${code}`), [`error ${code}`]);
  }
});

scenario("a secret that can be guessed is refused, unless --weak-secret", async ({ server, client, start }) => {
  const { at } = await server();
  const made = start("client", ["--new-secret"]);
  await made.ended;
  for (const weak of ["hunter2", "password", "12345678", "a".repeat(40), "three short words"]) {
    const run = start("client", [at, "alice"], { env: { PUNCH_SECRET: weak } });
    run.pipe();
    assert.equal(await run.ended, 1, run.evidence());
    assert.match(run.stderr(), /--weak-secret/);
  }
  for (const [words, ...args] of [["hunter2", "--weak-secret"], [made.stdout().trim()], [OTHER_SECRET]] as const) {
    const run = start("client", [at, "alice", ...args], { env: { PUNCH_SECRET: words! } });
    run.pipe();
    assert.equal(await run.ended, 0, run.evidence());
  }
  await client(at, "bob");
});

scenario(
  "--trace takes no word for its file but the one behind a `=`",
  async ({ server, client, start, directory }) => {
    const { at } = await server(), file = join(directory, "trace");
    const alice = start("client", [at, "--trace", "alice", "--json"]);
    await alice.until({ event: "login", name: "alice" });
    assert.match(alice.stderr(), /LOGIN/);
    const words = OWN === "deno" ? ["run", `--allow-write=${file}`, ...wordsOf("client").slice(1)] : ["client.ts"];
    const bob = start("client", [at, "bob", "--json", `--trace=${file}`], { words });
    await bob.until({ event: "login" });
    assert.match(readFileSync(file, "utf8"), /-> 127\.0\.0\.1:\d+ LOGIN/);
    assert.equal(bob.stderr(), "");
    await client(at, "carol");
  },
);

scenario("--trace=FILE on a full disk: the trace ends, and nothing else", async (stage) => {
  const mount = join(stage.directory, "mount"), file = join(mount, "trace");
  mkdirSync(mount);
  execFileSync("mount", ["-t", "tmpfs", "-o", "size=4k", "none", mount]);
  try {
    writeFileSync(join(mount, "all"), new Uint8Array(4_096));
    const words = (program: "server" | "client") =>
      OWN === "deno" ? ["run", `--allow-write=${file}`, ...wordsOf(program).slice(1)] : [`${program}.ts`];
    const at = ["--host", "127.0.0.1", "--port", "0", "--alt-port", "0", "--json", `--trace=${file}`];
    const server = stage.start("server", at, { words: words("server") });
    const { port } = await server.until({ event: "listening" });
    const alice = stage.start("client", [`127.0.0.1:${port}`, "alice", "--json", `--trace=${file}`], {
      words: words("client"),
    });
    alice.pipe("send alice hi");
    assert.equal(await alice.ended, 0, alice.evidence());
    for (const program of [server, alice]) {
      assert.match(program.stderr(), /^The trace ".*trace" ends here: ENOSPC\n$/, program.evidence());
    }
    server.signal("SIGTERM");
    await server.ended;
  } finally {
    execFileSync("umount", ["-l", mount]);
  }
}, notRoot);

// ---------------------------------------------------------------------------------------------------- packages

scenario("the three modules import nothing but the platform", () => {
  for (const module of MODULES) {
    const text = readFileSync(join(ROOT, module), "utf8");
    const imports = [...text.matchAll(/^(?:import|export|\}).* from "(.+)";$/gm)].map(([, from]) => from!);
    assert.ok(imports.length > 5);
    assert.deepEqual(imports.filter((from) => !from.startsWith("node:") && from !== "./protocol.ts"), []);
    assert.ok(
      !/\bimport\s*\(|^\s*import\s*["']|\brequire\(|createRequire|getBuiltinModule/m.test(text),
      `${module} imports something in another way`,
    );
  }
  return Promise.resolve();
});

/** They talk, started from that folder, by that command. */
async function talkFrom(stage: Stage, cwd: string, words: (program: string) => string[], env = {}): Promise<void> {
  const at = ["--host", "127.0.0.1", "--port", "0", "--alt-port", "0", "--json"];
  const help = stage.start("client", ["--help"], { cwd, words: words("client"), env });
  assert.equal(await help.ended, 0, help.evidence());
  const server = stage.start("server", at, { cwd, words: words("server"), env });
  const { port } = await server.until({ event: "listening" });
  const alice = stage.start("client", [`127.0.0.1:${port}`, "alice", "--json"], { cwd, words: words("client"), env });
  alice.pipe("send alice hi");
  assert.equal(await alice.ended, 0, alice.evidence());
  assert.equal(of(alice, "message").length, 1);
}

const local = (program: string) =>
  OWN === "deno" ? ["run", "--unstable-net", "-A", `${program}.ts`] : [`${program}.ts`];

scenario("packages that somebody has planted, or that are missing, are not looked at", async (stage) => {
  const parent = join(stage.directory, "parent"), cwd = join(parent, "punch"), marker = join(stage.directory, "marker");
  mkdirSync(cwd, { recursive: true });
  const bare = join(parent, "bare"); // the three files and nothing else
  mkdirSync(bare);
  for (const module of MODULES) copyFileSync(join(ROOT, module), join(bare, module));
  await talkFrom(stage, bare, local);
  for (const module of [...MODULES, "deno.json", "deno.lock"]) copyFileSync(join(ROOT, module), join(cwd, module));
  await talkFrom(stage, cwd, local);
  mkdirSync(join(parent, "node_modules")); // an empty one is enough for Bun to install nothing any more
  await talkFrom(stage, cwd, local);
  const evil = `require("node:fs").writeFileSync(${JSON.stringify(marker)}, "here"); module.exports = {};`;
  for (const folder of [parent, cwd, bare]) {
    for (const name of ["deno-std", "deno-std@1.4.0", "@std/cli", "util", "readline", "process", "crypto"]) {
      const at = join(folder, "node_modules", name);
      mkdirSync(join(at, "cli"), { recursive: true });
      writeFileSync(join(at, "package.json"), JSON.stringify({ name, version: "1.4.0", main: "index.js" }));
      for (const file of ["index.js", "cli/parse_args.js", "cli/prompt_secret.js"]) writeFileSync(join(at, file), evil);
    }
  }
  for (const folder of [cwd, bare]) await talkFrom(stage, folder, local);
  assert.ok(!existsSync(marker), "planted code ran");
});

scenario("the first start, without a network and without anything from before", async (stage) => {
  const cwd = join(stage.directory, "punch"), home = join(stage.directory, "home");
  for (const folder of [cwd, home]) mkdirSync(folder);
  for (const module of [...MODULES, "deno.json", "deno.lock"]) copyFileSync(join(ROOT, module), join(cwd, module));
  const words = (program: string) => local(program).map((word) => `'${word}'`).join(" ");
  const port = 20_000 + process.pid % 20_000;
  const lines = [
    "ip link set lo up",
    `'${executable(OWN)}' ${words("server")} --host 127.0.0.1 --port ${port} --json &`,
    `echo send alice hi | '${executable(OWN)}' ${words("client")} 127.0.0.1:${port} alice --json; code=$?`,
    "kill $!; exit $code",
  ];
  const { stdout, stderr, code } = await new Promise<{ stdout: string; stderr: string; code: unknown }>((resolve) => {
    const child = spawn("unshare", ["-n", "sh", "-c", lines.join("\n")], {
      cwd,
      env: { HOME: home, DENO_DIR: join(home, "deno"), PATH: process.env["PATH"], DENO_NO_UPDATE_CHECK: "1" } as never,
    });
    let stdout = "", stderr = "";
    child.stdout.on("data", (text) => stdout += text);
    child.stderr.on("data", (text) => stderr += text);
    child.on("close", (code) => resolve({ stdout, stderr, code }));
  });
  assert.equal(code, 0, stdout + stderr);
  assert.match(stdout, /"event":"message","from":"alice","text":"hi"/);
}, notRoot);

scenario("from a URL", async (stage) => {
  const files = createServer((request, response) => {
    const name = request.url!.slice(1);
    response.setHeader("content-type", "application/typescript");
    response.end(MODULES.includes(name) ? readFileSync(join(ROOT, name)) : "throw 404");
  });
  await new Promise<void>((resolve) => files.listen(0, "127.0.0.1", resolve));
  const { port } = files.address() as { port: number };
  const words = (program: string) => ["run", "--unstable-net", "-A", `http://127.0.0.1:${port}/${program}.ts`];
  try {
    await talkFrom(stage, stage.directory, words, { DENO_DIR: join(stage.directory, "cache") });
  } finally {
    files.close();
  }
}, OWN !== "deno" && "Bun runs nothing from a URL");
