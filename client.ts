#!/usr/bin/env bun
/**
 * The reprise client: gets files from a reprise server, whole, through any interruption.
 *
 * ```sh
 * bun client.ts get photo.png                  # into client_root/
 * bun client.ts get photo.png -o /tmp/p.png    # or anywhere
 * bun client.ts cat notes.txt | wc             # or into a pipe
 * bun client.ts ls --server 192.0.2.7:2121
 * bun client.ts                                # resumes what was interrupted, then prompts
 * ```
 *
 * As a library: `Remote`, with a method for each action; importing this file starts nothing.
 */
import { closeSync, constants, openSync, type Stats, statSync, unlinkSync } from "node:fs";
import { basename, join } from "node:path";
import {
  type Args,
  command,
  formatSize,
  isoTime,
  isTerminal,
  numberOption,
  print,
  printable,
  report,
  runScript,
  runWords,
  say,
  secondsOption,
  setQuiet,
  showsProgress,
  sizeOption,
  usage,
} from "./command.ts";
import { version } from "./package.json";
import { DEFAULT_PORT, type Entry, ERRORS, type Meta, quote, RepriseError, splitPath } from "./protocol.ts";
import { parseServers, Remote } from "./remote.ts";
import { asLocal, LOG_SUFFIX, PART_SUFFIX, PartFile, readLog, StreamTarget, type Target } from "./resume.ts";

export { parseServers, Remote };

/** How long an interrupted client may take to save its log before it is ended all the same. */
const INTERRUPT_MS = 1_000;

// ---------------------------------------------------------------------------------------------------- commands

const common = {
  server: { type: "string", valueHint: "host:port", description: "Server, or several with commas (REPRISE_SERVER)" },
  timeout: {
    type: "string",
    valueHint: "seconds",
    default: "30",
    description: "Give up a wait after this long without a byte",
  },
  retries: { type: "string", valueHint: "number", default: "10", description: "Further attempts after a failure" },
  "limit-rate": { type: "string", valueHint: "rate", description: "Bytes a second at the most, as in 500K or 10M" },
  quiet: { type: "boolean", alias: "q", description: "Say nothing but errors" },
  json: { type: "boolean", description: "One JSON object a line on stdout" },
} as const;

const destination = {
  directory: {
    type: "string",
    alias: "d",
    valueHint: "dir",
    default: "client_root",
    description: "Folder for what arrives",
  },
} as const;

/** What a command works with: at the prompt one for all lines, else one for the command. */
interface Context {
  remote: Remote;
  server: string;
  /** At the prompt: the folder on the server that names are relative to. */
  folder: string;
  json: boolean;
}

const get = command({
  meta: { name: "get", description: "Get files, going on where an earlier attempt was cut" },
  args: {
    "path…": { type: "positional", description: "Files on the server" },
    ...common,
    ...destination,
    output: { type: "string", alias: "o", valueHint: "file", description: "Name for the file; - is standard output" },
  },
  run: withContext(async (context, args) => {
    const paths = remotePaths(context, args);
    const output = args.output as string | undefined;
    if (output !== undefined && output !== "-" && paths.length > 1)
      throw usage("-o takes one file, use -d for several");
    const targets = paths.map((path) => ({ path, file: output ?? join(String(args.directory), basename(path)) }));
    checkTwins(output === "-" ? [] : targets);
    await forEach(targets, ({ path, file }) => getOne(context, path, file));
  }),
});

const cat = command({
  meta: { name: "cat", description: "Write files to standard output, one after the other" },
  args: { "path…": { type: "positional", description: "Files on the server" }, ...common },
  run: withContext(async (context, args) => {
    await forEach(remotePaths(context, args), (path) => getOne(context, path, "-"));
  }),
});

const ls = command({
  meta: { name: "ls", description: "List a folder" },
  args: {
    path: { type: "positional", required: false, description: "Folder on the server" },
    ...common,
    long: { type: "boolean", alias: "l", description: "With size and time" },
    recursive: { type: "boolean", alias: "r", description: "With the folders below" },
  },
  run: withContext(async (context, args) => {
    const path = resolveRemote(context.folder, String(args.path ?? ""));
    const recursive = args.recursive === true;
    if (context.json) {
      for await (const entry of listing(context.remote, path, recursive)) await print(JSON.stringify(jsonEntry(entry)));
      return;
    }
    const { formatListing } = await import("./terminal.ts");
    const entries = await Array.fromAsync(listing(context.remote, path, recursive));
    if (entries.length > 0) await print(formatListing(entries, args.long === true));
  }),
});

const stat = command({
  meta: { name: "stat", description: "Show what is known of a file or folder" },
  args: { path: { type: "positional", description: "File or folder on the server" }, ...common },
  run: withContext(async (context, args) => {
    const path = resolveRemote(context.folder, String(args.path));
    const meta = await context.remote.stat(path);
    const shown = { ...jsonEntry({ ...meta, path }), etag: meta.etag };
    if (context.json) return print(JSON.stringify(shown));
    await printFields(shown);
  }),
});

const resume = command({
  meta: { name: "resume", description: "Go on with every interrupted transfer" },
  args: { ...common, ...destination },
  run: withContext(async (context, args) => {
    const found = await resumeAll(context, String(args.directory), args.server === undefined ? args : undefined);
    if (found === 0) say("info", "nothing to resume");
  }),
});

const status = command({
  meta: { name: "status", description: "Show the server's version, workers and replicas" },
  args: common,
  run: withContext(async (context) => {
    const info = await context.remote.status();
    if (context.json) return print(JSON.stringify(info));
    await printFields(info);
  }),
});

export const main = command({
  meta: { name: "client.ts", version, description: "reprise client: files, whole, through any interruption" },
  args: { ...common, ...destination },
  subCommands: { get, cat, ls, stat, resume, status },
  run: withContext(async (context, args) => {
    await resumeFirst(context, args);
    await readPrompt(context, args);
  }),
});

// ---------------------------------------------------------------------------------------------------- their parts

/** Turns a function of a context into a command's `run`; the prompt hands its own context in as `data`. */
function withContext(run: (context: Context, args: Args) => Promise<unknown>) {
  return async ({ args, data }: { args: unknown; data?: unknown }): Promise<void> => {
    const options = args as Args;
    if (data) return runAtPrompt(run, data as Context, options);
    setQuiet(options.quiet === true);
    const context = contextFrom(options, watchSignals());
    try {
      await run(context, options);
    } finally {
      context.remote.close();
    }
  };
}

async function runAtPrompt(
  run: (context: Context, args: Args) => Promise<unknown>,
  context: Context,
  args: Args,
): Promise<void> {
  if (args.server !== undefined) throw usage("--server belongs on the command line: the prompt has its server");
  await run({ ...context, json: args.json === true }, args);
}

function contextFrom(args: Args, signal: AbortSignal, server = serverOf(args)): Context {
  const remote = new Remote({
    servers: parseServers(server),
    timeoutMs: secondsOption(args, "timeout"),
    retries: numberOption(args, "retries", { min: 0, max: 1_000_000 }),
    limitRate: sizeOption(args, "limit-rate"),
    signal,
    note: (text) => say("warn", text),
  });
  return { remote, server, folder: "", json: args.json === true };
}

function serverOf(args: Args): string {
  return String(args.server ?? (process.env.REPRISE_SERVER || `127.0.0.1:${DEFAULT_PORT}`));
}

/** Aborts on SIGINT and SIGTERM, and sees to it that the process then ends even if something hangs. */
const interruption = new AbortController();
function watchSignals(): AbortSignal {
  for (const [name, code] of [
    ["SIGINT", "interrupted"],
    ["SIGTERM", "terminated"],
  ] as const) {
    process.on(name, () => {
      const end = () => process.exit(ERRORS[code].exit);
      if (interruption.signal.aborted) end();
      interruption.abort(new RepriseError(code, `${code}; the same command goes on from here`));
      setTimeout(end, INTERRUPT_MS).unref();
    });
  }
  return interruption.signal;
}

/** Every item is tried and each failure has its line; the first one is thrown in the end, and gives the exit status. */
async function forEach<T>(items: T[], work: (item: T) => Promise<void>): Promise<void> {
  let first: unknown;
  for (const item of items) {
    try {
      await work(item);
    } catch (error) {
      const fatal = !(error instanceof RepriseError) || error.code === "pipe_closed" || interruption.signal.aborted;
      if (fatal) throw error;
      report(error);
      first ??= error;
    }
  }
  if (first) throw first;
}

async function getOne(context: Context, path: string, file: string): Promise<void> {
  // What the server would refuse makes no file here.
  splitPath(path);
  if (file === "-") return getStream(context, path, 1, "standard output");
  const found = lookAt(file);
  if (found && !found.isFile() && !found.isDirectory()) return getDevice(context, path, file);
  const started = performance.now();
  const done = (meta: Meta, offset: number) => printGot(context, { path, file, ...meta, offset, started });
  const complete = found?.isFile() ? await ifComplete(context.remote, path, file) : undefined;
  if (complete) return done(complete, complete.size);
  const part = PartFile.open(file, path, context.server, (text) => say("warn", text));
  const offset = part.bytes;
  try {
    const meta = await transfer(context, path, part, () => part.finish());
    await done(meta, offset);
  } catch (error) {
    if (part.bytes === 0) part.discard();
    throw error;
  } finally {
    part.close();
  }
}

/** `path file size mtime etag offset ms`: contract for `get --json`. */
async function printGot(context: Context, got: Meta & { path: string; file: string; offset: number; started: number }) {
  if (!context.json) return;
  const { path, file, size, mtime, etag, offset } = got;
  const ms = Math.round(performance.now() - got.started);
  await print(JSON.stringify({ path, file, size, mtime: isoTime(mtime), etag, offset, ms }));
}

/** Undefined for what is not there, or cannot be: making it says why. */
function lookAt(file: string): Stats | undefined {
  try {
    return statSync(file);
  } catch {
    return undefined;
  }
}

async function getDevice(context: Context, path: string, file: string): Promise<void> {
  let fd: number;
  try {
    fd = openSync(file, constants.O_WRONLY);
  } catch (error) {
    throw asLocal(error, file);
  }
  try {
    await getStream(context, path, fd, file);
  } finally {
    closeSync(fd);
  }
}

async function getStream(context: Context, path: string, fd: number, name: string): Promise<void> {
  const target = new StreamTarget(fd, name);
  try {
    await transfer(context, path, target, async () => {});
  } finally {
    target.close();
  }
}

/** A download with its progress line. */
async function transfer(context: Context, path: string, target: Target, finish: () => Promise<void>): Promise<Meta> {
  const line = showsProgress() ? new (await import("./terminal.ts")).ProgressLine(basename(path)) : undefined;
  let done = false;
  try {
    const meta = await context.remote.download(path, target, {
      begin: (meta, offset) => line?.begin(offset, meta.size),
      progress: (bytes) => line?.update(bytes),
    });
    line?.doing("writing to disk");
    await finish();
    done = true;
    return meta;
  } finally {
    line?.end(done);
  }
}

/** What the server has, if the local file is that, by size and time: then nothing is sent. */
async function ifComplete(remote: Remote, path: string, file: string): Promise<Meta | undefined> {
  const local = statSync(file, { bigint: true });
  const meta = await remote.stat(path);
  // A time set through a double may be off by one microsecond.
  const sameTime = Math.abs(Number(local.mtimeNs / 1000n) - meta.mtime) <= 1;
  if (meta.kind !== "file" || Number(local.size) !== meta.size || !sameTime) return undefined;
  // A process that died between its last two steps leaves the log of a file that is there.
  if (!statSync(file + PART_SUFFIX, { throwIfNoEntry: false })) removeStaleLog(file);
  say("info", `${printable(file)} is complete already`);
  return meta;
}

function removeStaleLog(file: string): void {
  try {
    unlinkSync(file + LOG_SUFFIX);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw asLocal(error, file);
  }
}

/** What comes before the prompt; a person is shown what fails, a script ends with it. */
async function resumeFirst(context: Context, args: Args): Promise<void> {
  try {
    await resumeAll(context, String(args.directory), args.server === undefined ? args : undefined);
  } catch (error) {
    if (!isTerminal(0) || interruption.signal.aborted) throw error;
    report(error);
  }
}

/** Goes on with every download that has a log under `directory`; returns how many there were. */
async function resumeAll(context: Context, directory: string, args: Args | undefined): Promise<number> {
  const logs: string[] = [];
  if (statSync(directory, { throwIfNoEntry: false })?.isDirectory()) {
    for await (const name of new Bun.Glob(`**/*${LOG_SUFFIX}`).scan({ cwd: directory, dot: true }))
      logs.push(join(directory, name));
  }
  await forEach(logs.sort(), async (name) => {
    const log = readLog(name);
    const file = name.slice(0, -LOG_SUFFIX.length);
    if (log === undefined) return;
    if (typeof log === "string") throw new RepriseError("local", `${log}; get ${quote(file)} again`);
    say("info", `resuming ${printable(file)} at ${formatSize(log.bytes)} of ${formatSize(log.size)}`);
    const own = args ? contextFrom(args, interruption.signal, log.server) : undefined;
    try {
      await getOne(own ?? context, log.path, file);
    } finally {
      own?.remote.close();
    }
  });
  return logs.length;
}

/** A folder's entries; a file lists itself. */
async function* listing(remote: Remote, path: string, recursive: boolean): AsyncGenerator<Entry> {
  try {
    yield* remote.list(path, recursive);
  } catch (error) {
    if (!(error instanceof RepriseError) || error.code !== "not_a_folder") throw error;
    yield { ...(await remote.stat(path)), path: basename(path) };
  }
}

async function printFields(fields: Record<string, unknown>): Promise<void> {
  const { formatFields } = await import("./terminal.ts");
  await print(formatFields(fields));
}

/** `path type size mtime`: contract for `--json`. */
function jsonEntry({ path, kind, size, mtime }: Entry): Record<string, unknown> {
  return { path, type: kind, size, mtime: isoTime(mtime) };
}

/** The paths that a command names, relative to the prompt's folder. */
function remotePaths(context: Context, args: Args): string[] {
  return args._.map((path) => resolveRemote(context.folder, path));
}

/** At the prompt `..`, `.` and a leading slash mean what they mean in a shell; elsewhere the server sees every word. */
function resolveRemote(folder: string, path: string): string {
  if (folder === "") return path.length > 1 && path.endsWith("/") ? path.slice(0, -1) : path === "/" ? "" : path;
  return join("/", folder, path).slice(1).replace(/\/$/, "");
}

function checkTwins(targets: { path: string; file: string }[]): void {
  const seen = new Map<string, string>();
  for (const { path, file } of targets) {
    const twin = seen.get(file);
    if (twin !== undefined) throw usage(`${quote(twin)} and ${quote(path)} would both be written to ${quote(file)}`);
    seen.set(file, path);
  }
}

// ---------------------------------------------------------------------------------------------------- prompt

const PROMPT_HELP = `get PATH…   into the local folder (-o FILE, -d DIR)
ls [PATH]   list a folder (-l, -r)
cd [PATH]   go to a folder on the server
stat PATH   what is known of a file
resume      go on with what was interrupted
help, quit`;

async function readPrompt(context: Context, args: Args): Promise<void> {
  const directory = String(args.directory);
  if (isTerminal(0)) say("info", `connected to ${context.server}; files go to ${directory}/; help lists the commands`);
  let line = new AbortController();
  let busy = false;
  const renew = () => {
    line = new AbortController();
    context.remote = contextFrom(args, AbortSignal.any([line.signal, interruption.signal])).remote;
  };
  context.remote.close();
  renew();
  const { readCommands } = await import("./terminal.ts");
  await readCommands({
    prompt: () => `reprise:/${printable(context.folder)}> `,
    complete: (words) => complete(context, words),
    cancel() {
      if (busy) line.abort(new RepriseError("interrupted", "interrupted; the same command goes on from here"));
      return busy;
    },
    async run(words) {
      if (line.signal.aborted) renew();
      busy = true;
      try {
        return await runLine(context, words, directory);
      } finally {
        busy = false;
      }
    },
  });
}

async function runLine(context: Context, words: string[], directory: string): Promise<boolean> {
  const [name, ...rest] = words;
  if (name === "quit" || name === "exit") {
    await context.remote.quit();
    return false;
  }
  if (name === "help") await print(PROMPT_HELP);
  else if (name === "cd") await changeFolder(context, rest);
  else if (name === "get" || name === "resume") await runWords(main, [name, "-d", directory, ...rest], context);
  else await runWords(main, words, context);
  return true;
}

async function changeFolder(context: Context, words: string[]): Promise<void> {
  if (words.length > 1) throw usage("cd takes one folder");
  const folder = words[0] === undefined ? "" : join("/", context.folder, words[0]).slice(1).replace(/\/$/, "");
  const { kind } = await context.remote.stat(folder);
  if (kind !== "folder") throw new RepriseError("not_a_folder", `not a folder: ${quote(folder)}`);
  context.folder = folder;
}

/** Commands for the first word, names on the server for the others. */
async function complete(context: Context, words: string[]): Promise<string[]> {
  if (words.length <= 1) return ["cd", "get", "help", "ls", "quit", "resume", "stat"];
  const typed = words.at(-1)!;
  const parent = typed.slice(0, typed.lastIndexOf("/") + 1);
  const names: string[] = [];
  for await (const { path, kind } of context.remote.list(resolveRemote(context.folder, parent))) {
    names.push(parent + path + (kind === "folder" ? "/" : ""));
  }
  return names.sort();
}

if (import.meta.main) await runScript(main);
