/**
 * The client's prompt: what was interrupted is resumed first, then each line is a command, run in one context.
 */
import { readdirSync } from "node:fs";
import {
  type Args,
  type Command,
  command,
  isTerminal,
  print,
  printable,
  report,
  runWords,
  say,
  usage,
} from "./command.ts";
import { type Context, common, contextFrom, interruption, resolveRemote } from "./context.ts";
import { quote, RepriseError } from "./protocol.ts";
import { parseServers, Remote, type RemoteOptions } from "./remote.ts";
import { readCommands } from "./terminal.ts";
import { resumeAll } from "./transfer.ts";

/** How long Tab waits for the server. */
const COMPLETION_MS = 3_000;

const HELP = `get PATH…          into the local folder (-o FILE, -d DIR, -r folders, '*.png')
put FILE…          to the folder that you are in (-t TARGET, -r folders)
ls [PATH]          list a folder (-l, -r)
cd [PATH]          go to a folder on the server
stat PATH          what is known of a file
rm PATH…           remove files (-r folders)
mv PATH… TARGET    rename, or move into a folder (-f replaces)
mkdir PATH…        make folders (-p with those above)
sync REMOTE LOCAL  make LOCAL equal REMOTE (--up the other way, --delete, --dry-run)
cat, status        as on the command line
resume             go on with what was interrupted
help, quit         COMMAND --help tells more`;

/** Commands whose answers, logs or files go to the local folder that the prompt was started with. */
const WITH_FOLDER = new Set(["get", "put", "sync", "resume"]);

export async function prompt(
  main: Command,
  commands: Record<string, Command>,
  outer: Context,
  args: Args,
): Promise<void> {
  const unresumed = await resumeFirst(outer, args);
  await readPrompt({ ...main, subCommands: withoutCommon(commands) }, outer, args);
  // A script has done its own work; what could not be resumed is still a failure.
  if (unresumed && !isTerminal(0)) throw unresumed;
}

/** A failure is said and returned: an old leftover must not keep anybody from new work. */
async function resumeFirst(context: Context, args: Args): Promise<unknown> {
  try {
    await resumeAll(context, String(args.directory));
    return undefined;
  } catch (error) {
    if (interruption.signal.aborted || !(error instanceof RepriseError)) throw error;
    report(error);
    return error;
  }
}

async function readPrompt(main: Command, outer: Context, args: Args): Promise<void> {
  const directory = String(args.directory);
  if (isTerminal(0)) say("info", `server ${outer.server}; files go to ${directory}/; help lists the commands`);
  outer.remote.close();
  let line = new AbortController();
  let busy = false;
  // Each interruption ends the connection with it, so that the next line has one of its own.
  const renewed = () => contextFrom(args, AbortSignal.any([line.signal, interruption.signal]));
  const context = { ...renewed(), folder: "" };
  await readCommands({
    prompt: () => `reprise:/${printable(context.folder)}> `,
    // While a line runs, its answers are on the way; names can wait.
    complete: async (words) => (busy ? [] : complete(main, context, words)),
    cancel() {
      if (busy) line.abort(new RepriseError("interrupted"));
      return busy;
    },
    async run(words) {
      if (line.signal.aborted) {
        line = new AbortController();
        Object.assign(context, renewed(), { folder: context.folder });
      }
      busy = true;
      try {
        return await runLine(main, context, words, directory);
      } finally {
        busy = false;
      }
    },
  });
  context.remote.close();
}

/** The commands as they are at the prompt, which has its server and its options already. */
function withoutCommon(commands: Record<string, Command>): Record<string, Command> {
  const entries = Object.entries(commands).map(([name, definition]) => {
    const own = Object.entries(definition.args ?? {}).filter(
      ([name]) => name === "json" || !Object.hasOwn(common, name),
    );
    return [name, command({ ...definition, args: Object.fromEntries(own) })];
  });
  return Object.fromEntries(entries);
}

async function runLine(main: Command, context: Context, words: string[], directory: string): Promise<boolean> {
  const [name, ...rest] = words as [string, ...string[]];
  if (name === "quit" || name === "exit") {
    await context.remote.quit();
    return false;
  }
  if (name === "help") await print(HELP);
  else if (name === "cd") await changeFolder(context, rest);
  else if (WITH_FOLDER.has(name)) await runWords(main, [name, "-d", directory, ...rest], context);
  else await runWords(main, words, context);
  return true;
}

async function changeFolder(context: Context, words: string[]): Promise<void> {
  if (words.length > 1) throw usage("cd takes one folder");
  const folder = words[0] === undefined ? "" : resolveRemote(context.folder, words[0]);
  const { kind } = await context.remote.stat(folder);
  if (kind !== "folder") throw new RepriseError("not_a_folder", `not a folder: ${quote(folder)}`);
  context.folder = folder;
}

/** Commands for the first word; then names on the server, or local ones for what is put. */
async function complete(main: Command, context: Context, words: string[]): Promise<string[]> {
  if (words.length <= 1) return [...Object.keys(main.subCommands ?? {}), "cd", "help", "quit"].sort();
  const typed = words.at(-1)!;
  return words[0] === "put" && words.at(-2) !== "-t"
    ? localNames(typed)
    : remoteNames({ servers: parseServers(context.server), ...context.credentials }, context.folder, typed);
}

/** The names in the folder that `typed` names or begins to name, each as it would be typed, folders with a slash. */
export async function remoteNames(
  options: Pick<RemoteOptions, "servers" | "token" | "ca">,
  folder: string | undefined,
  typed: string,
): Promise<string[]> {
  const parent = typed.slice(0, typed.lastIndexOf("/") + 1);
  // Only the prompt takes names from the top.
  if (folder === undefined && parent.startsWith("/")) return [];
  // A key press is not worth ten attempts.
  const remote = new Remote({ ...options, retries: 0, signal: AbortSignal.timeout(COMPLETION_MS) });
  try {
    const entries = await Array.fromAsync(remote.list(resolveRemote(folder, parent)));
    return typeable(entries.map(({ path, kind }) => parent + path + (kind === "folder" ? "/" : "")));
  } finally {
    remote.close();
  }
}

function localNames(typed: string): string[] {
  const parent = typed.slice(0, typed.lastIndexOf("/") + 1);
  const entries = readdirSync(parent || ".", { withFileTypes: true });
  return typeable(entries.map((entry) => parent + entry.name + (entry.isDirectory() ? "/" : "")));
}

/** What a terminal would obey can be typed by nobody, and must not be drawn. */
function typeable(names: string[]): string[] {
  return names.filter((name) => printable(name) === name).sort();
}
